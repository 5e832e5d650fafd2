#!/usr/bin/env bash
# identity: whoever is not who they say is told why, and counted; whoever is revoked is gone within 5 s.
source "$(dirname "$0")/../lib.sh"

services shop-1
control
door tricks shop-1/tricks
shard
edge shop-1 tricks tcp "127.0.0.1:${at[shop-1.tricks]}"
edges_ready shop-1
allow door/tricks service/tricks
door=127.0.0.1:${at[tricks]}

# Two machines with one identity: somebody copied the folder. The newer one takes over, as after a restart, and the
# older one does not fight for it; when it comes back after a minute, it is known for what it is. See the last step.
edge twin
edges_ready twin
cp -r "$dir/twin" "$dir/copy"
edge_config copy
start_edge copy
twins_began=$(now)

# token [OPTION...]: a join line for edges, in the file `line`.
token() { ctl token create --edge "$@" > "$dir/line" 2>> "$dir/log/meshctl.log"; }
# join NAME [OPTION...]: enrols somebody who must be turned away; prints what it is told.
join() {
  edge_config "$1"
  refused mesh-edge join --config "$dir/$1.toml" --file "$dir/line" "${@:2}"
}
# counted METRIC: whether control has counted one more since the step began.
counted() { (($(metric "${at[control.admin]}" "$1") > ${2:-0})) || fail "$1 did not grow"; }
codes() { printf 'mesh_control_token_refusals_total{code="%s"}' "$1"; }

step 'a token that was used already'
token --name fresh
edge_config fresh
mesh-edge join --config "$dir/fresh.toml" --file "$dir/line" 2>> "$dir/log/fresh.log"
words=$(join second --name fresh)
has "$words" 'used'
counted "$(codes token-used)"
ok "$(tail -n 1 <<< "$words")"

step 'a token that has expired'
token --ttl 1s
sleep 2 # there is no condition to wait for but the clock
words=$(join late --name late)
has "$words" 'expired'
counted "$(codes token-expired)"
ok "$(tail -n 1 <<< "$words")"

step 'a token that nobody made'
token
sed -i 's/^causeway:\/\/[^@]*/causeway:\/\/nobody.made-this-token-up/' "$dir/line"
words=$(join unknown --name unknown)
counted "$(codes token-unknown)"
ok "$(tail -n 1 <<< "$words")"

step 'a token for another name'
token --name somebody
words=$(join other --name other)
counted "$(codes token-mismatch)"
ok "$(tail -n 1 <<< "$words")"

step 'a second machine that wants a name which is taken'
token
words=$(join impostor --name shop-1)
has "$words" 'shop-1'
ok "$(tail -n 1 <<< "$words")"

step 'a join line with the hash of another CA'
token
sed -i "s/ca=sha256:[0-9a-f]*/ca=sha256:$(printf '%064d' 0)/" "$dir/line"
words=$(join wrong-ca --name wrong-ca)
has "$words" 'CA'
ok "$(tail -n 1 <<< "$words")"

step 'an edge whose CA is not that of the mesh'
mkdir "$dir/foreign"
cp -r "$dir/shop-1" "$dir/stranger"
edge_config stranger
# A mesh of its own, with the same names: only the CA is another one.
port foreign.api foreign.admin
printf '%s\n' "listen = '127.0.0.1:${at[foreign.api]}'" "admin = '127.0.0.1:${at[foreign.admin]}'" \
  "data_dir = '$dir/foreign/control'" "trust_domain = '$domain'" > "$dir/foreign.toml"
start foreign mesh-control --config "$dir/foreign.toml"
wait_for 20 ready "${at[foreign.admin]}"
CAUSEWAY_HOME=$dir/foreign/home meshctl login --file "$dir/foreign/control/admin.join" > /dev/null
CAUSEWAY_HOME=$dir/foreign/home meshctl token create --edge --name shop-1 2>> "$dir/log/meshctl.log" |
  mesh-edge join --replace --config "$dir/stranger.toml" 2>> "$dir/log/stranger.log"
echo "127.0.0.1:${at[shard.mesh]}" > "$dir/stranger/shards"
start_edge stranger
distrusted() { get "http://127.0.0.1:${at[stranger]}/metrics" | grep -E 'mesh_edge_identity_errors_total.* [1-9]'; }
wait_for 20 distrusted
edge_ready shop-1 || fail 'the true one lost its tunnel'
stop stranger
stop foreign
ok "$(grep -o 'kind="[^"]*"' "$dir/log/stranger.log" | tail -n 1)"

step 'revocation ends a live tunnel and the streams in it'
start pull mesh-loadtest pull --connect "$door"
wait_for 10 grep -q flowing "$dir/log/pull.out"
tunnels=$(metric "${at[shard.admin]}" mesh_shard_tunnels)
began=$(now)
ctl edge revoke shop-1 --yes > /dev/null
one_less() { (($(metric "${at[shard.admin]}" mesh_shard_tunnels) < tunnels)); }
wait_for 10 one_less
took=$(since "$began")
(($(now) - began < 5000)) || fail "it took $took"
wait_for 10 grep -q end= "$dir/log/pull.out"
end=$(figure end "$(cat "$dir/log/pull.out")")
[[ $end != eof ]] || fail 'the client saw a clean end'
ok "after $took; the client saw '$end'"

step 'a revoked edge is refused, told so, and counted'
stop shop-1
start_edge shop-1
grown() { (($(metric "$1" "$2") > 0)); }
wait_for 10 grown "${at[shop-1]}" 'mesh_edge_identity_errors_total{kind="revoked"}'
(($(metric "${at[shard.admin]}" 'mesh_shard_arrivals_total{outcome="revoked"}') > 0)) || fail 'not counted by the shard'
if edge_ready shop-1 2> /dev/null; then fail 'it says that it is ready'; fi
ok "$(grep -o 'The certificate is revoked[^.]*' "$dir/log/shop-1.log" | head -n 1)"

step 'it comes back with a new token'
stop shop-1
token --name shop-1 --replace
mesh-edge join --replace --config "$dir/shop-1.toml" --file "$dir/line" 2>> "$dir/log/shop-1.log"
start_edge shop-1
edges_ready shop-1
mesh-loadtest echo --connect "$door" --say echo --bytes 1000 > /dev/null
ok

step 'a revoked user is refused'
ctl token create --user mallory --group admin 2>> "$dir/log/meshctl.log" | ctl --home "$dir/mallory" login > /dev/null
ctl user revoke mallory --yes > /dev/null
turned_away() { ! ctl --home "$dir/mallory" edge ls; }
wait_for 5 turned_away
words=$(refused ctl --home "$dir/mallory" edge ls)
has "$words" 'revoked'
ok "$words"

step 'two machines with one identity do not duel: one stays, the other one is told'
has "$(cat "$dir/log/twin.log")" 'A newer connection of this edge took over'
duplicated() { (($(metric "${at[shard.admin]}" mesh_shard_duplicate_identities_total) > 0)); }
wait_for 90 duplicated
wait_for 10 grep -q 'same identity' "$dir/log/twin.log"
(($(metric "${at[twin]}" 'mesh_edge_identity_errors_total{kind="duplicate-identity"}') > 0)) || fail 'it did not count that'
edge_ready copy || fail 'the other one lost its tunnel'
stop twin
stop copy
ok "after $(since "$twins_began"): $(grep -o 'the machine at [^;]*' "$dir/log/twin.log" | head -n 1)"

step 'a certificate that has expired'
# A mesh whose certificates live for 6 seconds; this edge sleeps through the renewal of its own.
for name in control shard-1 shop-1; do stop "$name"; done
tcp_doors=()
rm -r "$CAUSEWAY_HOME" "$dir/control" "$dir/shard-1"
control '[leaf_ttl_secs]' 'edge = 6'
shard
token --name sleeper
edge_config sleeper
mesh-edge join --config "$dir/sleeper.toml" --file "$dir/line" 2>> "$dir/log/sleeper.log"
sleep 7 # there is no condition to wait for but the clock
start_edge sleeper
wait_for 10 grep -q 'expired' "$dir/log/sleeper.log"
wait_for 10 grown "${at[sleeper]}" 'mesh_edge_identity_errors_total{kind="expired"}'
ok "$(grep -o "This machine's certificate has expired[^(]*" "$dir/log/sleeper.log" | head -n 1)"

step 'an edge that is awake renews, and no stream is dropped'
services awake
edge awake tricks tcp "127.0.0.1:${at[awake.tricks]}"
edges_ready awake
allow group/admin edge/awake '*'
port local
start forward meshctl forward awake "${at[awake.tricks]}:${at[local]}"
wait_for 10 listening "${at[local]}"
figures=$(mesh-loadtest latency --connect "127.0.0.1:${at[local]}" --seconds 9)
renewals=$(metric "${at[awake]}" 'mesh_edge_renewals_total{outcome="ok"}')
((renewals >= 2)) || fail "it renewed $renewals times"
ok "one stream of 9 s over $renewals renewals, every echo there (max $(figure max_ms "$figures") ms)"
