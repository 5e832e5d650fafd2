#!/usr/bin/env bash
# cost: what an idle edge costs its machine, and an idle tunnel its shard.
source "$(dirname "$0")/../lib.sh"

services shop-1
control
shard
edge shop-1 web http "127.0.0.1:${at[shop-1.http]}" tricks tcp "127.0.0.1:${at[shop-1.tricks]}"
edges_ready shop-1
allow group/admin edge/shop-1 '*'

step 'an idle edge'
below "$(rss shop-1)" $((20 * 1024)) 'the memory of an idle edge in KiB'
ok "$(mib "$(rss shop-1)") resident ($(awk '$1 == "RssAnon:" { print $2 }' "/proc/${pid[shop-1]}/status") KiB of it its own)"

step 'an edge that moved 200 MB in each direction, and is idle again'
port local
start forward meshctl forward shop-1 "${at[shop-1.tricks]}:${at[local]}"
wait_for 10 listening "${at[local]}"
mesh-loadtest echo --connect "127.0.0.1:${at[local]}" --say echo --bytes 200000000 > "$dir/echo"
mesh-loadtest streams --connect "127.0.0.1:${at[local]}" --count 100 --rounds 2 > /dev/null
stop forward
ok "$(mib "$(rss shop-1)"); $(figure mb_s "$(cat "$dir/echo")") MB/s through meshctl forward"

# Half of the tunnels first: what the first ones cost is the allocator's start, and the slope is the tunnel's cost.
tunnels() { (($(metric "${at[shard.admin]}" mesh_shard_tunnels) > $1)); }
many() {
  ctl token create --edge --uses "$2" > "$dir/line" 2>> "$dir/log/meshctl.log"
  start "$1" mesh-loadtest edges --join "$dir/line" --count "$2" --dir "$dir/$1" --prefix "$1"
  wait_for 120 grep -q "connected=$2" "$dir/log/$1.out"
}

step 'an idle tunnel at the shard'
many first 250
first=$(rss shard-1)
many second 250
wait_for 10 tunnels 500
second=$(rss shard-1)
each=$(((second - first) * 1024 / 250))
below "$each" 65536 'an idle tunnel in bytes'
ok "$((each / 1024)) KiB each, from 250 to 500 tunnels ($(mib "$first") to $(mib "$second"))"

step 'what control keeps of 500 edges'
ok "$(mib "$(rss control)")"

step '500 edges are killed and the shard forgets them'
began=$(now)
crash first
crash second
left() { (($(metric "${at[shard.admin]}" mesh_shard_tunnels) <= 1)); }
wait_for 60 left
ok "after $(since "$began"); the shard keeps $(mib "$(rss shard-1)")"
