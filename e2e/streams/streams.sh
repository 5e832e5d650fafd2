#!/usr/bin/env bash
# streams: a thousand at once, readers that stall, and ends that arrive as what they are.
source "$(dirname "$0")/../lib.sh"

services shop-1
control
door tricks shop-1/tricks
door closed shop-1:9
shard
edge shop-1 tricks tcp "127.0.0.1:${at[shop-1.tricks]}" -- "allow = ['localhost:9']"
edges_ready shop-1
allow door/tricks service/tricks
allow door/closed edge/shop-1 9
door=127.0.0.1:${at[tricks]}

step 'half-close and reset, in both directions'
mesh-loadtest check --connect "$door" > "$dir/check"
ok
sed 's/^/        /' "$dir/check"

step 'a target on which nobody listens: the client sees a reset, and the record says why'
words=$(refused mesh-loadtest echo --connect "127.0.0.1:${at[closed]}" --bytes 10)
has "$words" 'reset'
wait_for 5 grep -q '"code":"target-refused"' "$dir/log/shard-1.access"
ok "$(grep -o '"detail":"[^"]*"' "$dir/log/shard-1.access" | head -n 1)"

step '1,000 streams at once on one tunnel'
# Streams that came and went before must not have used up the room of those that come now.
mesh-loadtest latency --connect "$door" --seconds 1 --fresh > /dev/null
figures=$(mesh-loadtest streams --connect "$door" --count 1000 --rounds 5)
has "$figures" open=1000
same "$(metric "${at[shard.admin]}" mesh_shard_tunnels)" 1
ok "all open after $(figure all_open_s "$figures") s, 5,000 echoes: p50 $(figure p50_ms "$(tail -n 1 <<< "$figures")") ms, \
p99 $(figure p99_ms "$(tail -n 1 <<< "$figures")") ms"

step 'afterwards nothing is left: streams, descriptors'
# idle PROCESS...: whether no stream is left.
idle() { [[ $(metric "${at[shard.admin]}" 'mesh_shard_streams{door="tricks"}') == 0 ]]; }
wait_for 10 idle
descriptors() { find "/proc/${pid[$1]}/fd" -mindepth 1 | wc -l; }
few() { (($(descriptors shop-1) < 30 && $(descriptors shard-1) < 40)); }
wait_for 10 few
ok "$(descriptors shard-1) descriptors at the shard, $(descriptors shop-1) at the edge"

step 'readers that stop reading stall nobody else, and memory stays bounded'
# Fresh processes: what the allocator keeps of the thousand streams would hide what a stalled one costs.
for name in shop-1 shard-1; do stop "$name"; done
start_shard
wait_for 20 ready "${at[shard.admin]}"
start_edge shop-1
edges_ready shop-1
alone=$(mesh-loadtest latency --connect "$door" --seconds 2)
shard_before=$(rss shard-1) edge_before=$(rss shop-1)
mkfifo "$dir/go"
# stall COUNT: that many connections ask for bytes without end and read none, until release.
stall() {
  mesh-loadtest hold --connect "$door" --count "$1" --say 'source 0\n' < "$dir/go" > "$dir/held" &
  pid[hold]=$!
  exec 5> "$dir/go"
  wait_for 20 grep -q "held=$1" "$dir/held"
}
release() {
  exec 5>&-
  wait "${pid[hold]}" || true
  unset 'pid[hold]'
}
stall 10
beside=$(mesh-loadtest latency --connect "$door" --seconds 4)
shard_grown=$(($(rss shard-1) - shard_before)) edge_grown=$(($(rss shop-1) - edge_before))
mesh-loadtest echo --connect "$door" --say echo --bytes 100000000 > "$dir/echo"
release
below "$(figure p50_ms "$beside")" 20 'the median latency beside stalled readers'
below "$(figure p99_ms "$beside")" 500 'the 99th percentile beside stalled readers'
below "$((shard_grown / 10))" 2048 'what the shard keeps for a stalled stream in KiB'
below "$((edge_grown / 10))" 2048 'what the edge keeps for a stalled stream in KiB'
ok "10 stalled; echo p50 $(figure p50_ms "$beside") ms, p99 $(figure p99_ms "$beside") ms (alone \
$(figure p50_ms "$alone"), $(figure p99_ms "$alone")); 100 MB beside them at $(figure mb_s "$(cat "$dir/echo")") MB/s; \
for each stalled stream the shard keeps $((shard_grown / 10)) KiB, the edge $((edge_grown / 10)) KiB"

step '100 readers that stop reading: the tunnel keeps to its bound, and goes on when some of them have been cut'
wait_for 20 idle
shard_before=$(rss shard-1) edge_before=$(rss shop-1)
stall 100
wait_for 20 grep -q '"code":"stalled"' "$dir/log/shard-1.access"
shard_grown=$(($(rss shard-1) - shard_before)) edge_grown=$(($(rss shop-1) - edge_before))
served() { mesh-loadtest echo --connect "$door" --say echo --bytes 1000; }
began=$(now)
wait_for 20 served
after=$(since "$began")
release
# 32 MiB for the tunnel; a hundred connections with their tasks and buffers come on top.
below "$shard_grown" $((40 * 1024)) 'the growth of the shard in KiB'
below "$edge_grown" $((40 * 1024)) 'the growth of the edge in KiB'
ok "$(grep -c '"code":"stalled"' "$dir/log/shard-1.access") were cut, others served after $after; \
shard +$(mib "$shard_grown"), edge +$(mib "$edge_grown")"

step 'kill -9 of the edge in mid-stream: an error, never a clean end'
start pull mesh-loadtest pull --connect "$door"
wait_for 10 grep -q flowing "$dir/log/pull.out"
began=$(now)
crash shop-1
wait_for 30 grep -q end= "$dir/log/pull.out"
end=$(figure end "$(cat "$dir/log/pull.out")")
[[ $end != eof ]] || fail 'the client saw a clean end'
ok "the client saw '$end' after $(since "$began")"

start_edge shop-1
edges_ready shop-1
step 'kill -9 of the shard in mid-stream: an error, never a clean end'
: > "$dir/log/pull.out"
start pull mesh-loadtest pull --connect "$door"
wait_for 10 grep -q flowing "$dir/log/pull.out"
began=$(now)
crash shard-1
wait_for 30 grep -q end= "$dir/log/pull.out"
end=$(figure end "$(cat "$dir/log/pull.out")")
[[ $end != eof ]] || fail 'the client saw a clean end'
ok "the client saw '$end' after $(since "$began")"
