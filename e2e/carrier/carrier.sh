#!/usr/bin/env bash
# carrier: a network that lets no UDP through, from the start, in mid-life, and lets it through again.
# The edge is behind a router of its own, which drops silently, as firewalls do.
source "$(dirname "$0")/../lab.sh"

lab wire

step 'a mesh on one side, and an edge on the other'
udp pass
echo_site
ok

step 'UDP blocked from the start: the first stream works within 2 s'
udp drop
began=$(now)
start_site_edge shop-1
wait_for 10 echoes
took_less "$began" 2000 'the time to the first stream'
took=$(since "$began")
over tcp || fail 'it is not over TCP'
same "$(shard_over tcp)" 1
grep -q 'UDP does not come through' "$dir/log/shop-1.log" || fail 'the log does not say so'
told udp-blocked 0 'over TCP, since QUIC did not come through' shop-1
ok "$took after the start of the process"

step 'UDP opened: back on QUIC within 60 s, and the stream that runs goes on'
start kept mesh-loadtest latency --connect "$host:${at[echo]}" --seconds 50
kept_runs() { [[ $(metric "${at[shard.admin]}" 'mesh_shard_door_connections{door="echo"}') != 0 ]]; }
wait_for 5 kept_runs
udp pass
began=$(now)
wait_for 60 over quic
took=$(since "$began")
wait_for 5 echoes
wait "${pid[kept]}" || fail "the stream broke: $(cat "$dir/log/kept.log")"
unset 'pid[kept]'
ok "$took; the stream over TCP: $(tail -n 1 "$dir/log/kept.out")"

step 'and the old tunnel is gone once its streams have ended'
old_gone() { [[ $(shard_over tcp) == 0 && $(shard_over quic) == 1 ]]; }
wait_for 10 old_gone
ok

step 'UDP blocked in mid-life: back on TCP within 10 s'
udp drop
began=$(now)
wait_for 15 over tcp
carrier=$(since "$began")
wait_for 10 echoes
took_less "$began" 10000 'the time without streams'
ok "the tunnel after $carrier, a stream after $(since "$began")"

step 'UDP opened again: back on QUIC within 60 s, and the stream that runs goes on'
start kept mesh-loadtest latency --connect "$host:${at[echo]}" --seconds 58
wait_for 5 kept_runs
udp pass
began=$(now)
wait_for 60 over quic
took=$(since "$began")
wait "${pid[kept]}" || fail "the stream broke: $(cat "$dir/log/kept.log")"
unset 'pid[kept]'
ok "$took; $(tail -n 1 "$dir/log/kept.out")"
same "$(edge_metric 'mesh_edge_carrier_changes_total{to="quic"}')" 2
same "$(edge_metric 'mesh_edge_carrier_changes_total{to="tcp"}')" 2

step 'UDP rejected by ICMP: the edge does not wait'
stop shop-1
udp reject
began=$(now)
start_site_edge shop-1
wait_for 10 echoes
took_less "$began" 2000 'the time to the first stream'
ok "$(since "$began") after the start of the process"

step 'a bulk transfer over TCP does not hold up small messages'
start bulk mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 2000000000
beside=$(mesh-loadtest latency --connect "$host:${at[echo]}" --seconds 5)
crash bulk
below "$(figure p99_ms "$beside")" 1200 'p99 of an echo beside a bulk transfer'
ok "$beside"
