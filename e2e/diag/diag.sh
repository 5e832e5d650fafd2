#!/usr/bin/env bash
# diag: an edge's network goes wrong in one way after the other, and the edge, netcheck and why each name the cause.
# The edge is behind a router of its own.
# shellcheck disable=SC2034 # where control and the shard listen
net=10.$((RANDOM % 200 + 20)).$((RANDOM % 200 + 20))
host=$net.1
source "$(dirname "$0")/../lib.sh"

step 'a network behind a router'
[[ $(id -u) == 0 ]] || {
  not_here 'it takes root to make one'
  exit 0
}
router=causeway-router-$$ site=causeway-site-$$
clean_up() {
  ip netns del "$site" 2> /dev/null
  ip netns del "$router" 2> /dev/null
}
ip netns add "$router"
ip netns add "$site"
ip link add "cw-$$" type veth peer name "cr-$$"
ip link set "cr-$$" netns "$router"
ip -n "$router" link add "ci-$$" type veth peer name "ce-$$" netns "$site"
ip addr add "$net.1/25" dev "cw-$$"
ip link set "cw-$$" up
ip -n "$router" addr add "$net.2/25" dev "cr-$$"
ip -n "$router" addr add "$net.129/25" dev "ci-$$"
ip -n "$router" link set "cr-$$" up
ip -n "$router" link set "ci-$$" up
ip -n "$site" addr add "$net.130/25" dev "ce-$$"
ip -n "$site" link set "ce-$$" up
ip -n "$site" link set lo up
ip -n "$site" route add default via "$net.129"
ip netns exec "$router" sysctl -qw net.ipv4.ip_forward=1
ip route add "$net.128/25" via "$net.2"
ok

# way RULE...: what the router does with packets between the two sides; what no rule names passes. Control's port and the
# edge's admin server always stay open.
way() {
  ip netns exec "$router" nft -f - << RULES
table inet way
delete table inet way
table inet way {
  chain forward {
    type filter hook forward priority 0; policy accept;
    tcp dport ${at[control.api]} accept
    tcp sport ${at[control.api]} accept
    ${at[shop-1]:+tcp dport ${at[shop-1]} accept; tcp sport ${at[shop-1]} accept}
    $(printf '%s\n' "$@")
  }
}
RULES
}
in_site() { ip netns exec "$site" "$@"; }
start_site_edge() { start shop-1 ip netns exec "$site" "$@" "$(command -v mesh-edge)" --config "$dir/shop-1.toml"; }

# says CAUSE WORDS: what the edge itself must say, soon.
# QUIC that has just failed is tried again after 40 s at most.
says() {
  named() {
    in_site mesh-edge status --config "$dir/shop-1.toml" --json > "$dir/status.json" 2>> "$dir/log/status.log" || true
    grep -q "\"cause\": \"$1\"" "$dir/status.json" && grep -qiF -e "$2" "$dir/status.json"
  }
  wait_for 70 named "$1" "$2" || fail "$(tail -n 8 "$dir/status.json")"
  sentence=$(grep -o '"sentence": "[^"]*"' "$dir/status.json" | cut -d'"' -f4)
}
# checks CAUSE STATUS [CONFIG]: what netcheck must come to from there.
checks() {
  local got=0
  in_site "${time[@]}" mesh-edge netcheck --json --config "${3:-$dir/shop-1.toml}" > "$dir/netcheck.json" 2>> "$dir/log/netcheck.log" || got=$?
  grep -q "\"cause\": \"$1\"" "$dir/netcheck.json" || fail "$(cat "$dir/netcheck.json")"
  same "$got" "$2"
}
time=()
# found WHAT VERDICT: whether netcheck has that check with that verdict.
found() { tr -d ' \n' < "$dir/netcheck.json" | grep -q "\"what\":\"$1\",\"of\":\"[^\"]*\",\"verdict\":\"$2\"" || fail "no $1 $2: $(cat "$dir/netcheck.json")"; }
# why CAUSE WORDS: what meshctl must say of it, soon.
why() {
  told() {
    ctl why shop-1 -o json > "$dir/why" 2>> "$dir/log/meshctl.log" || true
    grep -q "\"cause\": \"$1\"" "$dir/why" && grep -qF -e "$2" "$dir/why"
  }
  wait_for 25 told "$1" "$2" || fail "$(cat "$dir/why")"
}

step 'a mesh on one side, and an edge on the other'
control
shard
way
edge_config shop-1 -- "allow = ['127.0.0.1:9']"
sed -i "s/^admin = .*/admin = '$net.130:${at[shop-1]}'/" "$dir/shop-1.toml"
ctl token create --edge --name shop-1 2>> "$dir/log/meshctl.log" | tee "$dir/join.line" |
  in_site mesh-edge join --config "$dir/shop-1.toml" 2>> "$dir/log/shop-1.log"
start_site_edge
allow group/admin 'edge/*' '*'
says none 'over quic'
ok "$sentence"

step 'a good network is called good'
checks none 0
for what in dns udp tcp mtu clock certificate; do found "$what" ok; done
why none 'is there'
# Shards tell control every two seconds.
shows() { [[ $(ctl edge show shop-1) == *"$1"* ]]; }
wait_for 10 shows quic
has "$(ctl policy test --from user/admin --group admin shop-1:9)" 'by the edge itself: 127.0.0.1:9'
has "$(refused ctl policy test --from user/admin --group admin shop-1:23)" 'the edge itself does not'
ok "$(grep -o '"figure": "[^"]*round trip' "$dir/netcheck.json" | head -n 1 | cut -d'"' -f4)"

step 'ping tells the way, the round trips and the losses'
pinged=$(ctl ping shop-1 -c 5 -i 0.1)
has "$pinged" 'shop-1 (quic'
has "$pinged" 'p50/p90/p99'
has "$pinged" 'QUIC packets to shard-1 lost'
ok "$(tail -n 2 <<< "$pinged" | head -n 1)"

step 'a path that takes less than the interface'
ip netns exec "$router" ip link set "ci-$$" mtu 1280
ip netns exec "$router" ip link set "cr-$$" mtu 1280
checks mtu 1
found mtu slow
ip netns exec "$router" ip link set "ci-$$" mtu 1500
ip netns exec "$router" ip link set "cr-$$" mtu 1500
ok "$(grep -o '"figure": "[0-9]* bytes[^"]*' "$dir/netcheck.json" | head -n 1 | cut -d'"' -f4)"

step 'UDP blocked'
way 'meta l4proto udp drop'
says udp-blocked 'over tcp'
checks udp-blocked 1
found udp blocked
found tcp ok
why udp-blocked 'over TCP'
has "$(ctl edge ls)" 'tcp'
ok "$sentence"

step 'everything blocked'
way drop
says blocked 'No answer'
in_site timeout 60 mesh-edge netcheck --config "$dir/shop-1.toml" > "$dir/netcheck.txt" 2>&1 && fail 'netcheck is content'
grep -q 'blocked' "$dir/netcheck.txt"
ok "$sentence"

step 'everything rejected'
way "ip daddr $net.1 reject with icmp type port-unreachable"
says rejected 'Nothing listens'
checks rejected 4
ok "$sentence"

step 'no route'
ip -n "$site" route del default
says no-route 'no route'
checks no-route 4
ip -n "$site" route add default via "$net.129"
way
says none connected
ok

step 'the name cannot be resolved'
stop shop-1
sed "s/^admin = .*/&\nshards = ['nowhere.invalid:7400']/" "$dir/shop-1.toml" > "$dir/nameless.toml"
mv "$dir/shop-1.toml" "$dir/good.toml" && cp "$dir/nameless.toml" "$dir/shop-1.toml"
start_site_edge
says name-unknown 'cannot be resolved'
checks name-unknown 4
stop shop-1
cp "$dir/good.toml" "$dir/shop-1.toml"
ok "$sentence"

step 'a proxy that wants to know who one is'
port proxy
cat > "$dir/tinyproxy.conf" << CONF
Port ${at[proxy]}
Listen $host
BasicAuth me swordfish
MaxClients 20
Timeout 60
CONF
start tinyproxy tinyproxy -d -c "$dir/tinyproxy.conf"
wait_for 5 listening "${at[proxy]}"
way "tcp dport ${at[proxy]} accept" "tcp sport ${at[proxy]} accept" drop
printf "[proxy]\nurl = 'http://me:wrongfish@%s:%s'\n" "$host" "${at[proxy]}" >> "$dir/shop-1.toml"
start_site_edge
says proxy-refused '40'
checks proxy-refused 4
found proxy rejected
ok "$sentence"

step 'and that lets one through who knows'
stop shop-1
sed -i 's/wrongfish/swordfish/' "$dir/shop-1.toml"
start_site_edge
says udp-blocked 'through http://'
checks udp-blocked 1
found proxy ok
why udp-blocked 'through http://'
has "$(ctl edge show shop-1)" 'tcp (proxy)'
ok "$sentence"

step 'an archive for those who help, without a secret'
ctl diag shop-1 --file "$dir/diag.tar.gz" --config "$dir/shop-1.toml" --config "$dir/shard-1.toml" --config "$dir/control.toml" \
  --admin "$host:${at[shard.admin]}" --admin "$host:${at[control.admin]}" --admin "$net.130:${at[shop-1]}" \
  --log "$dir/log/shop-1.log" --log "$dir/log/shard-1.log" --log "$dir/log/control.log" > "$dir/diag.out"
mkdir "$dir/unpacked"
tar -xzf "$dir/diag.tar.gz" -C "$dir/unpacked"
for file in manifest.json versions.json why.json netcheck.json control/ring.json control/policy.json config/shop-1.json \
  "process/${at[shard.admin]}/metrics" "process/${at[shop-1]}/status" certificates/login.json logs/shop-1.log; do
  [[ -s $dir/unpacked/causeway-diag/$file ]] || fail "$file is not in it: $(cat "$dir/unpacked/causeway-diag/manifest.json")"
done
{
  # Every line of every private key, the proxy's password, and the tokens.
  for pem in "$dir"/*/identity.pem "$dir/control/ca.key"; do sed -n '/PRIVATE/,/END/p' "$pem" | grep -v -- '-----'; done
  echo swordfish
  grep -o '//[^@]*@' "$dir/join.line" | tr -d '/@'
  grep -o '//[^@]*@' "$dir/control/admin.join" | tr -d '/@'
} > "$dir/secrets"
below 3 "$(wc -l < "$dir/secrets")" 'the number of secrets to look for'
! grep -rFf "$dir/secrets" "$dir/unpacked" || fail 'a secret is in it'
ok "$(find "$dir/unpacked" -type f | wc -l) files, $(wc -l < "$dir/secrets") secrets looked for"

step 'another CA'
stop shop-1
way
cp "$dir/good.toml" "$dir/shop-1.toml"
cp "$dir/shop-1/bundle.pem" "$dir/bundle.good"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN=other -keyout /dev/null \
  -out "$dir/shop-1/bundle.pem" 2> /dev/null
start_site_edge
says wrong-ca 'another CA'
checks wrong-ca 3
stop shop-1
cp "$dir/bundle.good" "$dir/shop-1/bundle.pem"
ok "$sentence"

step 'a clock that is ahead by three days'
export FAKETIME_DONT_FAKE_MONOTONIC=1
# The library itself: faketime would stay between the story and the edge, which then could not be stopped.
preload=$(dpkg -L libfaketime | grep '/libfaketime\.so\.1$')
time=(env "LD_PRELOAD=$preload" FAKETIME=+3d)
start_site_edge "${time[@]}"
says clock 'timedatectl'
checks clock 3
found clock wrong
stop shop-1
ok "$sentence"

step 'a clock that is behind by three days'
time=(env "LD_PRELOAD=$preload" FAKETIME=-3d)
start_site_edge "${time[@]}"
says clock 'behind the shard'
why clock 'behind'
stop shop-1
time=()
ok "$sentence"

step 'control is away: the edge goes on'
start_site_edge
says none 'over quic'
crash control
says none 'over quic'
checks none 0
found clock unknown
ok "$sentence"

step 'the shard is away'
crash shard-1
says rejected 'Nothing listens'
ok "$sentence"

step 'revoked'
start control mesh-control --config "$dir/control.toml"
wait_for 20 ready "${at[control.admin]}"
start_shard
wait_for 20 ready "${at[shard.admin]}"
says none 'over quic'
ctl edge revoke shop-1 --yes > /dev/null
says revoked 'access away'
checks revoked 3
why revoked 'is revoked'
ok "$sentence"

step 'what happened is in the audit'
audited() { ctl audit --edge shop-1 -o json | grep -q '"who": "user/admin"'; }
wait_for 10 audited
has "$(ctl audit --user admin)" 'shop-1'
ok "$(ctl audit --user admin -o json | grep -c '"number"') records"

step 'mesh-edge does not run'
stop shop-1
has "$(refused in_site mesh-edge status --config "$dir/shop-1.toml")" 'does not run on this machine'
same "$(status)" 4
ok
