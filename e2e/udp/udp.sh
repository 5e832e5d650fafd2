#!/usr/bin/env bash
# udp: iperf3, a DNS server and a CoAP server behind an edge, reached through UDP doors over QUIC and over TCP; and the DNS door.
source "$(dirname "$0")/../lib.sh"
"$(dirname "$0")/../../scripts/need" iperf3 dig dnsmasq coap-client-notls socat

step 'iperf3, dnsmasq and a CoAP server'
port iperf-server dns-server coap-server detour forwarded names resolver
start iperf-server iperf3 -s -B 127.0.0.1 -p "${at[iperf-server]}"
text=$(printf 'x%.0s' {1..250})
start dns-server dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --port="${at[dns-server]}" \
  --listen-address=127.0.0.1 --bind-interfaces --edns-packet-max=4096 --user="$(id -un)" --pid-file= \
  --address=/till.shop.test/192.0.2.7 --txt-record="big.shop.test,$text,$text,$text,$text,$text,$text,$text,$text"
start coap-server coap-server-notls -A 127.0.0.1 -p "${at[coap-server]}"
answers() { [[ $(dig @127.0.0.1 -p "$1" +short +time=1 +tries=1 till.shop.test) == 192.0.2.7 ]]; }
wait_for 10 answers "${at[dns-server]}"
ok

step 'two edges, one of them in a network without UDP'
control
tcp_doors=("dns = '$host:${at[names]}'")
for edge in shop-1 shop-2; do
  door "$edge.iperf" "$edge/iperf"
  udp_door "$edge.iperf" "$edge/iperf-udp"
  udp_door "$edge.dns" "$edge/dns" 'idle_secs = 2'
  udp_door "$edge.coap" "$edge/coap"
done
shard
# On this way to the shard there is TCP only: UDP is answered by ICMP.
start detour socat "TCP-LISTEN:${at[detour]},bind=127.0.0.1,fork,reuseaddr,nodelay" "TCP:$host:${at[shard.mesh]},nodelay"
wait_for 10 listening "${at[detour]}"
behind=(iperf tcp "127.0.0.1:${at[iperf-server]}" iperf-udp udp "127.0.0.1:${at[iperf-server]}"
  dns udp "127.0.0.1:${at[dns-server]}" coap udp "127.0.0.1:${at[coap-server]}")
edge shop-1 "${behind[@]}"
edge shop-2 "${behind[@]}" -- "shards = ['127.0.0.1:${at[detour]}']"
edges_ready shop-1 shop-2
same "$(metric "${at[shard.admin]}" 'mesh_shard_carrier_tunnels{carrier="quic"}')" 1
same "$(metric "${at[shard.admin]}" 'mesh_shard_carrier_tunnels{carrier="tcp"}')" 1
ok

step 'without a rule nothing comes through, and a record names what is missing'
refused dig @127.0.0.1 -p "${at[shop-1.dns]}" +short +time=1 +tries=1 till.shop.test > /dev/null
wait_for 5 grep -q '"door":"shop-1.dns".*policy-denied' "$dir/log/shard-1.access"
allow door/shop-1.iperf service/iperf
allow 'door/*' 'edge/shop-*' '*'
ok

# What iperf3 measured, as its receiver says it: rate, jitter, lost and all datagrams.
measured() { awk '/receiver/ { printf "%s %s, jitter %s %s, lost %s %s", $7, $8, $9, $10, $11, $12 }' "$dir/iperf"; }
lost_percent() { awk '/receiver/ { gsub(/[(%)]/, "", $12); print $12 }' "$dir/iperf"; }

for edge in shop-1 shop-2; do
  carrier=$([[ $edge == shop-1 ]] && echo QUIC || echo TCP)
  for direction in up down; do
    for rate in 1M 20M; do
      step "$carrier: iperf3 -u -b $rate, $direction"
      reverse=()
      [[ $direction == down ]] && reverse=(-R)
      iperf3 -u -c 127.0.0.1 -p "${at[$edge.iperf]}" -b "$rate" -l 1200 -t 4 -O 1 "${reverse[@]}" > "$dir/iperf" 2>&1 ||
        fail "$(tail -n 3 "$dir/iperf")"
      below "$(lost_percent)" 2 'loss in percent'
      ok "$(measured)"
    done
  done

  step "$carrier: datagrams that fit into no packet: iperf3 -u -l 8000"
  iperf3 -u -c 127.0.0.1 -p "${at[$edge.iperf]}" -b 10M -l 8000 -t 4 -O 1 > "$dir/iperf" 2>&1 ||
    fail "$(tail -n 3 "$dir/iperf")"
  below "$(lost_percent)" 2 'loss in percent'
  ok "$(measured)"

  step "$carrier: dig asks dnsmasq 100 times, and for 2 kB in one datagram"
  began=$(now)
  for _ in {1..100}; do echo till.shop.test; done > "$dir/names"
  same "$(dig @127.0.0.1 -p "${at[$edge.dns]}" +short +time=2 +tries=1 -f "$dir/names" | grep -c '^192.0.2.7$')" 100
  took=$(($(now) - began))
  big=$(dig @127.0.0.1 -p "${at[$edge.dns]}" +bufsize=4096 +time=2 +tries=1 +ignore TXT big.shop.test)
  has "$big" "$text"
  has "$big" 'MSG SIZE  rcvd: 2*'
  ok "$((took / 100)) ms each, none lost; $(awk '/MSG SIZE/ { print $NF }' <<< "$big") bytes in one"

  step "$carrier: CoAP, with a body in blocks"
  has "$(coap-client-notls -m get -B 5 "coap://127.0.0.1:${at[$edge.coap]}/" 2>&1)" 'libcoap'
  head -c 5000 /dev/zero | tr '\0' c > "$dir/coap-body"
  coap-client-notls -m put -B 10 -f "$dir/coap-body" "coap://127.0.0.1:${at[$edge.coap]}/example_data" > "$dir/coap" 2>&1
  coap-client-notls -m get -B 10 -o "$dir/coap-back" "coap://127.0.0.1:${at[$edge.coap]}/example_data" >> "$dir/coap" 2>&1
  same "$(tr -d '\n' < "$dir/coap-back" | sha256sum)" "$(sha256sum < "$dir/coap-body")"
  ok '5000 bytes there and back'
done

step 'the DNS door: dig over UDP and TCP, and dnsmasq as a resolver in front'
ask() { dig @127.0.0.1 -p "${at[names]}" +time=2 +tries=1 "$@"; }
same "$(ask +short "shop-1.$domain")" 127.0.0.1
same "$(ask +short +tcp "iperf.SHOP-2.$domain")" 127.0.0.1
answer=$(ask +bufsize=1232 "shop-3.$domain")
has "$answer" 'status: NXDOMAIN'
has "$answer" 'flags: qr aa'
has "$answer" 'EDNS: version: 0'
has "$answer" "SOA	ns.$domain."
has "$(ask AAAA "shop-1.$domain")" 'status: NOERROR*ANSWER: 0, AUTHORITY: 1'
has "$(ask example.org)" 'status: REFUSED'
has "$(ask AXFR "$domain")" 'Transfer failed'
same "$(ask +short NS "$domain")" "ns.$domain."
start resolver dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --port="${at[resolver]}" \
  --listen-address=127.0.0.1 --bind-interfaces --user="$(id -un)" --pid-file= --server="/$domain/127.0.0.1#${at[names]}"
resolved() { [[ $(dig @127.0.0.1 -p "${at[resolver]}" +short +time=1 +tries=1 "shop-1.$domain") == 127.0.0.1 ]]; }
wait_for 10 resolved
has "$(dig @127.0.0.1 -p "${at[resolver]}" +time=2 +tries=1 "shop-3.$domain")" 'status: NXDOMAIN'
ok "$(awk '/MSG SIZE/ { print $NF }' <<< "$answer") bytes for a name that is not there"

step 'meshctl forward --udp'
start forward meshctl forward --udp shop-1/dns "${at[forwarded]}"
refused ctl forward --udp shop-1:1 0:0 > /dev/null
allow group/admin 'edge/shop-*' '*'
wait_for 10 answers "${at[forwarded]}"
stop forward
ok

step 'silence ends flows, and nothing is left of them'
flows() { echo $(($(metric "${at[shop-1]}" mesh_edge_udp_flows_active) + $(metric "${at[shop-2]}" mesh_edge_udp_flows_active))); }
# Those to the DNS server end after 2 s; those of the other doors are told to wait for a minute.
none_to_dns() { [[ $(metric "${at[shard.admin]}" 'mesh_shard_streams{door="shop-1.dns"}') == 0 && $(metric "${at[shard.admin]}" 'mesh_shard_streams{door="shop-2.dns"}') == 0 ]]; }
wait_for 10 none_to_dns
left=$(flows)
none() { [[ $(flows) == 0 ]]; }
wait_for 75 none
same "$(metric "${at[shard.admin]}" 'mesh_shard_streams{door="shop-1.coap"}')" 0
ok "$left after 2 s, none after a minute; the shard dropped $(metric "${at[shard.admin]}" 'mesh_shard_datagrams_total{direction="dropped"}') of $(metric "${at[shard.admin]}" 'mesh_shard_datagrams_total{direction="down"}') datagrams down"
