#!/usr/bin/env bash
# resilience: shard and control die and come back; what can go on goes on, and the rest resumes by itself.
source "$(dirname "$0")/../lib.sh"

edges=(shop-1 shop-2 shop-3)
for name in "${edges[@]}"; do services "$name"; done
control
door tricks shop-1/tricks
shard
for name in "${edges[@]}"; do
  edge "$name" web http "127.0.0.1:${at[$name.http]}" tricks tcp "127.0.0.1:${at[$name.tricks]}"
done
edges_ready "${edges[@]}"
allow door/http service/web
allow door/tricks service/tricks
page() { get "http://web.$1.$domain/" --connect "127.0.0.1:${at[shard.http]}"; }
for name in "${edges[@]}"; do same "$(page "$name")" "hello from $name"; done

step 'kill -9 of the shard: an edge says at once or soon that it is not reachable'
crash shard-1
began=$(now)
unready() { ! edge_ready shop-1; }
wait_for 20 unready
ok "after $(since "$began")"

step 'the shard is started again: every edge returns by itself'
began=$(now)
start_shard
for name in "${edges[@]}"; do
  wait_for 70 edge_ready "$name"
  times+=("$name $(since "$began")")
done
for name in "${edges[@]}"; do same "$(page "$name")" "hello from $name"; done
ok "$(printf '%s, ' "${times[@]}")and pages come"

step 'control is killed: streams go on, new ones too'
start pull mesh-loadtest pull --connect "127.0.0.1:${at[tricks]}" --bytes 3000000000
wait_for 10 grep -q flowing "$dir/log/pull.out"
crash control
for name in "${edges[@]}"; do same "$(page "$name")" "hello from $name"; done
running pull || has "$(cat "$dir/log/pull.out")" end=eof
unfollowed() { [[ $(metric "${at[shard.admin]}" mesh_shard_control_connected) == 0 ]]; }
wait_for 20 unfollowed
has "$(get "http://127.0.0.1:${at[shard.admin]}/readyz")" control
ok 'the shard stays ready, says that control is away, and counts it'

step 'meshctl while control is away: a clear error, and streams go on'
words=$(refused ctl token create --edge)
has "$words" "127.0.0.1:${at[control.api]}"
same "$(status)" 4
ok "$words"

step 'a token that is used while control is away: a clear error'
printf 'causeway://a.b@127.0.0.1:%s?ca=sha256:%064d\n' "${at[control.api]}" 0 > "$dir/line"
edge_config newcomer
words=$(refused timeout 20 mesh-edge join --config "$dir/newcomer.toml" --name newcomer --file "$dir/line")
has "$words" "127.0.0.1:${at[control.api]}"
ok "$(tail -n 1 <<< "$words")"

step 'an edge restarts while control is away'
stop shop-2
start_edge shop-2
began=$(now)
edges_ready shop-2
same "$(page shop-2)" 'hello from shop-2'
ok "ready after $(since "$began")"

step 'a shard restarts while control is away: it has no policy and lets nobody through'
crash shard-1
start_shard
# Default deny: a shard that knows no rules must not guess any.
denied() { ! page shop-1 > /dev/null 2>&1; }
wait_for 10 listening "${at[shard.http]}"
denied || fail 'it let somebody through without knowing the rules'
ok

step 'control is back: everything resumes by itself'
began=$(now)
start control mesh-control --config "$dir/control.toml"
wait_for 30 ready "${at[control.admin]}"
served() { [[ $(page "$1") == "hello from $1" ]]; }
for name in "${edges[@]}"; do wait_for 70 served "$name"; done
ok "every page comes after $(since "$began")"

step 'SIGTERM to the shard: it drains, and a stream that can end in time does'
: > "$dir/log/pull.out"
start pull mesh-loadtest pull --connect "127.0.0.1:${at[tricks]}" --bytes 50000000
wait_for 10 grep -q flowing "$dir/log/pull.out"
began=$(now)
stop shard-1
took=$(since "$began")
wait_for 10 grep -q end= "$dir/log/pull.out"
same "$(figure bytes "$(cat "$dir/log/pull.out")") $(figure end "$(cat "$dir/log/pull.out")")" '50000000 eof'
ok "the shard ended after $took"

step 'SIGTERM to an edge: it ends within its drain time'
began=$(now)
stop shop-3
(($(now) - began < 6000)) || fail "it took $(since "$began")"
ok "after $(since "$began")"
