#!/usr/bin/env bash
# blackhole: a target that answers nothing fails after its own deadline, and delays nobody else.
source "$(dirname "$0")/../lib.sh"

step 'a namespace whose firewall drops every SYN to one port'
[[ $(id -u) == 0 ]] || {
  not_here 'it takes root to make one'
  exit 0
}
namespace=causeway-$$
near=169.254.$((RANDOM % 200 + 20)).1
far=${near%.1}.2
clean_up() { ip netns del "$namespace" 2> /dev/null; }
ip netns add "$namespace"
ip link add "cw-$$" type veth peer name "cv-$$"
ip link set "cv-$$" netns "$namespace"
ip addr add "$near/24" dev "cw-$$"
ip link set "cw-$$" up
ip -n "$namespace" addr add "$far/24" dev "cv-$$"
ip -n "$namespace" link set "cv-$$" up
ip -n "$namespace" link set lo up
ip netns exec "$namespace" nft -f - << 'EOF'
table inet blackhole {
  chain input {
    type filter hook input priority 0; policy accept;
    tcp dport 81 tcp flags & (syn | ack) == syn drop
  }
}
EOF
start there ip netns exec "$namespace" "$(command -v mesh-loadtest)" serve --name there --http "$far:80" --tricks "$far:82"
wait_for 10 grep -q ready "$dir/log/there.out"
ok "$far, port 81"

control
door hole "shop-1/$far:81"
door there "shop-1/$far:82"
shard
edge shop-1 hole http "$far:81" -- "allow = ['$far:*']" 'dial_timeout = 3'
edges_ready shop-1
allow door/hole edge/shop-1 81
allow door/there edge/shop-1 82
token=$(ctl token create --access robot 2>> "$dir/log/meshctl.log")
allow user/robot service/hole

step 'a neighbour of the target is reached'
mesh-loadtest echo --connect "127.0.0.1:${at[there]}" --say echo --bytes 1000000 > /dev/null
ok

step 'the stream fails after its own deadline of 3 s'
began=$(now)
words=$(refused mesh-loadtest echo --connect "127.0.0.1:${at[hole]}" --say echo --bytes 10)
took=$(($(now) - began))
((took > 2500 && took < 5000)) || fail "it took $took ms"
grep '"code":"target-timeout"' "$dir/log/shard-1.access" > /dev/null || fail 'the access record does not say so'
ok "after $took ms ($words)"

step 'other streams are not delayed by 200 that wait in the black hole'
alone=$(mesh-loadtest latency --connect "127.0.0.1:${at[there]}" --seconds 2 --fresh)
start hold mesh-loadtest hold --connect "127.0.0.1:${at[hole]}" --count 200 --say x
pid[hold]=$!
beside=$(mesh-loadtest latency --connect "127.0.0.1:${at[there]}" --seconds 2 --fresh)
below "$(figure p50_ms "$beside")" 100 'the median time of a new stream'
below "$(figure max_ms "$beside")" 1500 'the longest time of a new stream'
ok "a new stream takes p50 $(figure p50_ms "$beside") ms, p99 $(figure p99_ms "$beside") ms (alone $(figure p50_ms "$alone"), $(figure p99_ms "$alone"))"

step 'the proxy door says whose fault it is'
answer=$(curl -sS -i -x "http://127.0.0.1:${at[shard.proxy]}" --proxy-user "robot:$token" "http://hole.shop-1.$domain/")
has "$answer" '504 target-timeout'
has "$answer" 'x-mesh-fault: target'
ok "$(tail -n 1 <<< "$answer")"
