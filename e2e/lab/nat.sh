#!/usr/bin/env bash
# nat: every kind of NAT, one that forgets within seconds, and UDP that is throttled.
source "$(dirname "$0")/../lab.sh"

lab link rate=100mbit delay=10ms

step 'a mesh in the cloud, an edge at the site'
echo_site
ok

for kind in full address port symmetric; do
  step "NAT: $kind"
  nat $kind
  began=$(now)
  start_site_edge shop-1
  wait_for 10 echoes
  took=$(since "$began")
  over quic
  figures=$(mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 5000000)
  told none 0 'shard-1 holds its tunnel' shop-1
  ok "first stream after $took, $(figure mb_s "$figures") MB/s"
  [[ $kind == symmetric ]] || stop shop-1
done

if whole; then
  step 'a NAT that forgets UDP after 10 s: an idle tunnel stays'
  in_router sysctl -qw net.netfilter.nf_conntrack_udp_timeout=10 net.netfilter.nf_conntrack_udp_timeout_stream=10
  start kept mesh-loadtest latency --connect "$host:${at[echo]}" --seconds 60 --every 20
  wait "${pid[kept]}" || fail "the stream broke: $(cat "$dir/log/kept.log")"
  unset 'pid[kept]'
  same "$(edge_metric 'mesh_edge_dials_total{outcome="welcome"}')" 1
  ok "an echo each 20 s: $(tail -n 1 "$dir/log/kept.out")"
fi

step 'UDP throttled to 64 kB/s by a policer: slow, and there'
stop shop-1
udp '64 kbytes/second'
start_site_edge shop-1
wait_for 20 echoes
figures=$(mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 200000)
beside=$(mesh-loadtest latency --connect "$host:${at[echo]}" --seconds 5)
over quic && carrier=QUIC || carrier=TCP
case $carrier in
  QUIC)
    # Only what is lost can be counted.
    start bulk mesh-loadtest pull --connect "$host:${at[echo]}"
    told lossy-path 0 'of 100 packets' shop-1
    crash bulk
    ;;
  TCP) told udp-blocked 0 'over TCP, since QUIC did not come through' shop-1 ;;
esac
ok "over $carrier, $(figure mb_s "$figures") MB/s; small messages: $beside"
