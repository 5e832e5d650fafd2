#!/usr/bin/env bash
# carrier: a network that lets no UDP through, from the start, in mid-life, and lets it through again.
# The edge is behind a router of its own, which drops silently, as firewalls do.
# shellcheck disable=SC2034 # where control and the shard listen
net=10.$((RANDOM % 200 + 20)).$((RANDOM % 200 + 20))
host=$net.1
source "$(dirname "$0")/../lib.sh"

step 'a network behind a router'
[[ $(id -u) == 0 ]] || {
  not_here 'it takes root to make one'
  exit 0
}
router=causeway-router-$$ site=causeway-site-$$
clean_up() {
  ip netns del "$site" 2> /dev/null
  ip netns del "$router" 2> /dev/null
}
ip netns add "$router"
ip netns add "$site"
ip link add "cw-$$" type veth peer name "cr-$$"
ip link set "cr-$$" netns "$router"
ip -n "$router" link add "ci-$$" type veth peer name "ce-$$" netns "$site"
ip addr add "$net.1/25" dev "cw-$$"
ip link set "cw-$$" up
ip -n "$router" addr add "$net.2/25" dev "cr-$$"
ip -n "$router" addr add "$net.129/25" dev "ci-$$"
ip -n "$router" link set "cr-$$" up
ip -n "$router" link set "ci-$$" up
ip -n "$site" addr add "$net.130/25" dev "ce-$$"
ip -n "$site" link set "ce-$$" up
ip -n "$site" link set lo up
ip -n "$site" route add default via "$net.129"
ip netns exec "$router" sysctl -qw net.ipv4.ip_forward=1
ip route add "$net.128/25" via "$net.2"
ok

# udp pass|drop|reject: what the router does with UDP.
udp() {
  ip netns exec "$router" nft -f - << EOF
table inet way
delete table inet way
table inet way {
  chain forward {
    type filter hook forward priority 0; policy accept;
    meta l4proto udp counter $(case $1 in pass) echo accept ;; *) echo "$1" ;; esac)
  }
}
EOF
}

step 'a mesh on one side, and an edge on the other'
udp pass
control
door echo shop-1/echo
shard
port tricks
start tricks ip netns exec "$site" "$(command -v mesh-loadtest)" serve --name shop-1 --tricks "127.0.0.1:${at[tricks]}"
edge_config shop-1 echo tcp "127.0.0.1:${at[tricks]}"
sed -i "s/^admin = .*/admin = '$net.130:${at[shop-1]}'/" "$dir/shop-1.toml"
ctl token create --edge --name shop-1 2>> "$dir/log/meshctl.log" |
  ip netns exec "$site" "$(command -v mesh-edge)" join --config "$dir/shop-1.toml" 2>> "$dir/log/shop-1.log"
allow door/echo service/echo
wait_for 10 grep -q ready "$dir/log/tricks.out"
ok

start_site_edge() { start shop-1 ip netns exec "$site" "$(command -v mesh-edge)" --config "$dir/shop-1.toml"; }
# One small stream to the site and back.
echoes() { timeout 1 mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 100; }
# edge_metric NAME, and by which carrier the edge is connected.
edge_metric() { get "http://$net.130:${at[shop-1]}/metrics" | awk -v name="$1" '$1 == name { value = $2 } END { print value + 0 }'; }
over() { [[ $(edge_metric "mesh_edge_carrier{carrier=\"$1\"}") == 1 ]]; }
shard_over() { metric "${at[shard.admin]}" "mesh_shard_carrier_tunnels{carrier=\"$1\"}"; }
# took_less BEGAN LIMIT_MS WHAT
took_less() { below "$(($(now) - $1))" "$2" "$3 in ms"; }

step 'UDP blocked from the start: the first stream works within 2 s'
udp drop
began=$(now)
start_site_edge
wait_for 10 echoes
took_less "$began" 2000 'the time to the first stream'
took=$(since "$began")
over tcp || fail 'it is not over TCP'
same "$(shard_over tcp)" 1
grep -q 'UDP does not come through' "$dir/log/shop-1.log" || fail 'the log does not say so'
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
start_site_edge
wait_for 10 echoes
took_less "$began" 2000 'the time to the first stream'
ok "$(since "$began") after the start of the process"

step 'a bulk transfer over TCP does not hold up small messages'
start bulk mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 2000000000
beside=$(mesh-loadtest latency --connect "$host:${at[echo]}" --seconds 5)
crash bulk
below "$(figure p99_ms "$beside")" 1200 'p99 of an echo beside a bulk transfer'
ok "$beside"
