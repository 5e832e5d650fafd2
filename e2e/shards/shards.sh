#!/usr/bin/env bash
# shards: PostgreSQL, two controls, several shards and a thousand edges; shards come, go, are killed and fall silent.
source "$(dirname "$0")/../lib.sh"

# What must hold however busy this machine is; how fast it is, `mesh-loadtest` itself judges when it is run by hand.

# fleet TOOL ARGUMENTS...: runs it, and keeps the object that it ends with. Its own verdict includes times.
fleet() {
  tool=$1
  mesh-loadtest "$@" --json > "$dir/$1.out" 2> "$dir/log/$1.log" || true
  tail -n 1 "$dir/$1.out" > "$dir/object"
  grep -q '^{' "$dir/object" || fail "$1 did not come to an end: $(tail -n 3 "$dir/log/$1.log")"
}
# field NAME: of that object.
field() {
  local value
  value=$(grep -o "\"$1\":[^,}]*" "$dir/object" | cut -d: -f2)
  [[ -n $value && $value != null ]] || fail "$1 was not measured: $(cat "$dir/object")"
  echo "$value"
}
# holds NAME VALUE...: pairs that must be as they are here.
holds() {
  while [[ $# -gt 0 ]]; do
    awk -v got="$(field "$1")" -v wanted="$2" 'BEGIN { exit !(got == wanted) }' ||
      fail "$1 is $(field "$1") instead of $2: $(cat "$dir/$tool.out")"
    shift 2
  done
}

step 'ten shards share ten thousand edges'
fleet balance
below "$(field max_over_mean)" 1.1001 'the fullest shard over the mean'
holds moved_elsewhere 0
ok "the fullest has $(field max_over_mean) of the mean; an owner is found in $(field lookup_ns) ns"

step 'a fourth shard comes'
fleet scale-out --edges 1000 --streams 300 --rate 100 --before 5
holds broken_streams 0 failed_requests 0
below "$(field seconds)" 30 'seconds until every edge is at its owner'
ok "$(field seconds) s, nothing broke, nothing failed"

step 'every shard is restarted in turn'
fleet rolling --shards 3 --edges 600 --streams 200 --rate 100 --drain 8 --before 3
holds broken_streams 0 failed_requests 0
ok "$(field seconds) s, nothing broke, nothing failed"

step 'one of four shards is killed'
fleet kill --edges 1000 --streams 300 --rate 100 --before 3
holds back_10s 1 hung_requests 0
ok "$(field back_5s) of its edges serve again within 5 s, all within 10 s"

step 'one of four shards falls silent'
fleet kill --silent --edges 600 --streams 100 --rate 50 --before 3
holds hung_requests 0
below 0.99 "$(awk -v back="$(field back_15s)" 'BEGIN { print back + 0.0001 }')" 'the share that is back'
ok "$(field back_15s) of its edges serve again within 15 s"

step 'both controls and their database go away, and come back'
fleet outage --edges 1000 --streams 300 --rate 50 --seconds 40
holds broken_streams 0 failed_requests 0 epoch_went_back 0 double_owner 0 tunnels_per_edge 1
ok 'nobody notices; one tunnel for each edge, no epoch goes back'
