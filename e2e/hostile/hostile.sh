#!/usr/bin/env bash
# hostile: ten thousand idle connections, slow clients and garbage on every port; the others are served meanwhile.
source "$(dirname "$0")/../lib.sh"

count=10000
ulimit -n "$(ulimit -H -n)"
if (($(ulimit -n) != -1 && $(ulimit -n) < count + 1000)); then count=$(($(ulimit -n) - 1000)); fi

services shop-1
control
door tricks shop-1/tricks
shard
edge shop-1 web http "127.0.0.1:${at[shop-1.http]}" tricks tcp "127.0.0.1:${at[shop-1.tricks]}"
edges_ready shop-1
allow door/http service/web
allow door/tricks service/tricks
page() { get "http://web.shop-1.$domain/" --connect "127.0.0.1:${at[shard.http]}"; }
same "$(page)" 'hello from shop-1'
mesh-loadtest latency --connect "127.0.0.1:${at[tricks]}" --seconds 1 > /dev/null

# held NAME PORT COUNT [OPTION...]: holds connections until release.
mkfifo "$dir/go"
held() {
  mesh-loadtest hold --connect "127.0.0.1:$2" --count "$3" "${@:4}" < "$dir/go" > "$dir/held" &
  pid[hold]=$!
  exec 5> "$dir/go"
  wait_for 60 grep -q "held=$3" "$dir/held"
}
release() {
  exec 5>&-
  wait "${pid[hold]}" || true
  unset 'pid[hold]'
}
# beside: what others see meanwhile.
beside() {
  local began took=()
  for _ in {1..10}; do
    began=$(now)
    same "$(page)" 'hello from shop-1'
    took+=($(($(now) - began)))
  done
  printf '%s\n' "${took[@]}" | sort -n | awk '{ t[NR] = $1 } END { printf "a page takes %d ms, at most %d ms", t[5], t[10] }'
  mesh-loadtest latency --connect "127.0.0.1:${at[tricks]}" --seconds 1 --fresh > "$dir/beside"
  below "$(figure p50_ms "$(cat "$dir/beside")")" 200 'the median time of a new stream meanwhile'
}
alone=$(beside)

for name in http proxy https; do
  step "$count idle connections on the $name door"
  before=$(rss shard-1)
  held "$name" "${at[shard.$name]}" "$count"
  figures=$(beside)
  grown=$(($(rss shard-1) - before))
  release
  below "$((grown / (count / 1000)))" 4000 'what 1,000 idle connections cost in KiB'
  ok "$figures (alone: ${alone#a page takes }); shard +$(mib "$grown"), $((grown * 1024 / count)) bytes each"
done

step '2,000 slow clients that send a request byte by byte (slowloris)'
before=$(rss shard-1)
held http "${at[shard.http]}" 2000 --drip --say "GET / HTTP/1.1\r\nHost: web.shop-1.$domain\r\nX-Slow: "
figures=$(beside)
grown=$(($(rss shard-1) - before))
thrown_out() { (($(metric "${at[shard.admin]}" 'mesh_shard_door_connections{door="http"}') < 100)); }
began=$(now)
wait_for 60 thrown_out
release
ok "$figures; shard +$(mib "$grown"); all thrown out after $(since "$began")"

step 'garbage on every port, TCP and UDP'
# What garbage provokes must not fill anybody's memory either.
before=$(rss shard-1) control_before=$(rss control) edge_before=$(rss shop-1)
ports=()
for name in shard.proxy shard.http shard.https shard.admin control.api control.admin shop-1 tricks; do
  ports+=(--tcp "127.0.0.1:${at[$name]}")
done
mesh-loadtest garbage --seconds 8 "${ports[@]}" --udp "127.0.0.1:${at[shard.mesh]}" > "$dir/garbage" &
pid[garbage]=$!
figures=$(beside)
wait "${pid[garbage]}"
unset 'pid[garbage]'
for name in control shard-1 shop-1; do running "$name" || fail "$name is gone"; done
for name in control shard-1 shop-1; do
  if grep -q 'panicked' "$dir/log/$name.log"; then fail "$name panicked"; fi
done
same "$(page)" 'hello from shop-1'
ctl edge ls > /dev/null
ok "$(cat "$dir/garbage"); meanwhile $figures; shard +$(mib $(($(rss shard-1) - before))), \
control +$(mib $(($(rss control) - control_before))), edge +$(mib $(($(rss shop-1) - edge_before)))"

step 'half a handshake: clients that go away in the middle of TLS'
for _ in {1..200}; do
  printf '\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' > "/dev/tcp/127.0.0.1/${at[shard.https]}"
  printf '\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' > "/dev/tcp/127.0.0.1/${at[shard.proxy]}"
  printf '\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' > "/dev/tcp/127.0.0.1/${at[control.api]}"
done 2> /dev/null
same "$(page)" 'hello from shop-1'
empty() { [[ $(metric "${at[shard.admin]}" 'mesh_shard_door_connections{door="https"}') == 0 ]]; }
wait_for 20 empty
ok 'none is left inside'
