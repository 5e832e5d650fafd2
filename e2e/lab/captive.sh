#!/usr/bin/env bash
# captive: a network with no way out but an HTTP proxy that asks for a password.
source "$(dirname "$0")/../lab.sh"

lab wire

step 'the router lets nothing through; on it is tinyproxy, with Basic auth'
port proxy
cat > "$dir/tinyproxy.conf" << CONF
Port ${at[proxy]}
Listen $inside.1
Timeout 600
MaxClients 20
BasicAuth site secret-of-the-site
ConnectPort 443
CONF
start tinyproxy ip netns exec "$router" "$(command -v tinyproxy)" -d -c "$dir/tinyproxy.conf"
wait_for 10 in_router nc -z "$inside.1" "${at[proxy]}"
# It enrols before it is carried to where it will stand.
echo_site \
  '[proxy]' "url = 'http://$inside.1:${at[proxy]}'" "credentials_file = '$dir/proxy.password'"
rules captive <<< 'chain forward { type filter hook forward priority 0; policy drop; }'
sed -i "s/^ConnectPort .*/ConnectPort ${at[shard.mesh]}/" "$dir/tinyproxy.conf"
stop tinyproxy
start tinyproxy ip netns exec "$router" "$(command -v tinyproxy)" -d -c "$dir/tinyproxy.conf"
wait_for 10 in_router nc -z "$inside.1" "${at[proxy]}"
ok "$(tinyproxy -v)"

step 'with a wrong password the edge says so'
(umask 077 && echo 'site:wrong' > "$dir/proxy.password")
start_site_edge shop-1
wait_for 20 grep -q 'proxy' "$dir/log/shop-1.log"
says_so() { grep -q 'proxy-refused' "$dir/log/shop-1.log"; }
wait_for 20 says_so
words=$(grep -m 1 'proxy-refused' "$dir/log/shop-1.log")
told never-connected 4 "$host:${at[shard.mesh]}" shop-1
stop shop-1
ok "${words#* }"

step 'with the right one it is there, over TCP'
(umask 077 && echo 'site:secret-of-the-site' > "$dir/proxy.password")
began=$(now)
start_site_edge shop-1
wait_for 20 echoes
took=$(since "$began")
over tcp
told udp-blocked 0 'through http://' shop-1
ok "$took after the start of the process; $sentence"

step 'bytes come through unharmed'
ok "$(mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 20000000)"

step 'the password is nowhere to be read'
grep -r 'secret-of-the-site' "$dir/log" && fail 'it is in a log'
site_get shop-1 metrics | grep 'secret' && fail 'it is in a metric'
tr '\0' ' ' < "/proc/${pid[shop-1]}/cmdline" | grep 'secret' && fail 'it is in the arguments'
ok
