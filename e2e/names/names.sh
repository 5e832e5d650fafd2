#!/usr/bin/env bash
# names: dig, kdig and drill ask the DNS door; programs on one edge reach another one by its loopback doors.
source "$(dirname "$0")/../lib.sh"
"$(dirname "$0")/../../scripts/need" dig kdig drill curl dnsmasq

step 'two edges, and a shard with a DNS door'
services shop-2
port dns dns-server proxy forward
start dns-server dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --port="${at[dns-server]}" \
  --listen-address=127.0.0.1 --bind-interfaces --user="$(id -un)" --pid-file= --address=/till.shop.test/192.0.2.7
control
tcp_doors+=("[doors.dns]" "listen = '$host:${at[dns]}'" "answers_per_sec = 100")
shard
edge shop-1 -- "[doors]" "proxy = '127.0.0.1:${at[proxy]}'" "domain = '$domain'" \
  "[[doors.forward]]" "listen = '127.0.0.1:${at[forward]}'" "target = 'shop-2/dns'" "udp = true"
edge shop-2 web http "127.0.0.1:${at[shop-2.http]}" dns udp "127.0.0.1:${at[dns-server]}"
edges_ready shop-1 shop-2
ok

ask() { dig "@127.0.0.1" -p "${at[dns]}" +time=2 +tries=2 "$@"; }

step 'dig: an edge, what is below it, nobody, another zone, the zone itself'
same "$(ask +short "shop-1.$domain")" 127.0.0.1
same "$(ask +short "web.shop-2.$domain")" 127.0.0.1
same "$(ask +short "SHOP-1.$domain" AAAA)" ''
has "$(ask "nobody.$domain")" 'status: NXDOMAIN'
has "$(ask example.org)" 'status: REFUSED'
has "$(ask "$domain" SOA)" "ns.$domain. hostmaster.$domain."
same "$(ask +short "$domain" NS)" "ns.$domain."
has "$(ask "shop-1.$domain")" 'flags: qr aa rd; QUERY: 1, ANSWER: 1*udp: 1232'
same "$(ask +short +tcp "shop-1.$domain")" 127.0.0.1
same "$(ask +short +noedns "shop-1.$domain")" 127.0.0.1
has "$(ask +edns=1 +noednsneg "shop-1.$domain")" BADVERS
ok

step 'kdig and drill'
same "$(kdig @127.0.0.1 -p "${at[dns]}" +short "shop-2.$domain")" 127.0.0.1
same "$(kdig @127.0.0.1 -p "${at[dns]}" +tcp +short "shop-2.$domain")" 127.0.0.1
has "$(drill -p "${at[dns]}" "shop-2.$domain" @127.0.0.1)" '127.0.0.1'
ok

step 'who asks too often is sent to TCP'
for _ in {1..400}; do echo "shop-1.$domain"; done > "$dir/names"
dig @127.0.0.1 -p "${at[dns]}" +ignore +time=1 +tries=1 +short -f "$dir/names" > /dev/null || true
ok "$(metric "${at[shard.admin]}" 'mesh_shard_dns_questions_total{outcome="limited"}') sent to TCP, $(metric "${at[shard.admin]}" 'mesh_shard_dns_questions_total{outcome="dropped"}') dropped of 400"

step 'without a rule an edge reaches nobody, and curl is told why'
words=$(refused curl -sS -v --proxytunnel --proxy "http://127.0.0.1:${at[proxy]}" "http://web.shop-2.$domain/")
has "$words" '403 policy-denied'
allow edge/shop-1 edge/shop-2
allow edge/shop-1 service/web
allow edge/shop-1 service/dns
ok

step 'curl on one edge reaches a service on another one: CONNECT and SOCKS5'
same "$(curl -sS --proxytunnel --proxy "http://127.0.0.1:${at[proxy]}" "http://web.shop-2.$domain/")" 'hello from shop-2'
same "$(curl -sS --proxy "socks5h://127.0.0.1:${at[proxy]}" "http://web.shop-2.$domain/")" 'hello from shop-2'
same "$(curl -sS --proxy "socks5h://127.0.0.1:${at[proxy]}" "http://shop-2:${at[shop-2.http]}/")" 'hello from shop-2'
ok

step 'a forward for UDP: dig on one edge asks the DNS server of another one'
same "$(dig @127.0.0.1 -p "${at[forward]}" +short +time=2 +tries=2 till.shop.test)" 192.0.2.7
ok
