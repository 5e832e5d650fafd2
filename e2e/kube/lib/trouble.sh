# Sourced by kube.sh: what kubectl shows when something is away, and what goes on. The functions leave their figures in
# `words`, since what they start and stop is this shell's.
# shellcheck shell=bash disable=SC2034 # kube.sh reads it

works() { [[ $(patience=15 k exec "pod-$1" -c main -- echo works) == works ]]; }
# holder N: the shard at which the edge of node-N is. It says so as well while it has not pinged it yet.
holder() { curl -s "http://10.200.$1.2:${at[node-$1]}/readyz" | grep -o 'shard-[0-9]*' | head -n 1; }
restart() {
  start_shard "$1"
  wait_for 20 ready "${at[$1.admin]}"
}
# let_go NAME: has a shard that is stopping end now: what is left are connections that kube-apiserver keeps for later.
let_go() {
  wait_for 5 serves_nobody "$1"
  stop "$1"
}
serves_nobody() { (($(metric "${at[$1.admin]}" mesh_shard_tunnels) == $(metric "${at[$1.admin]}" mesh_shard_tunnels_leaving))); }

# --- what goes on while a shard leaves --------------------------------------------------------------------------------

# going N: an exec, a `logs -f` and a port-forward to pod-N that have something to do until it is enough.
# gone_on N: waits until each has done some more, says that it is enough, and compares every byte.
going() {
  rm -f "$dir/enough" "$dir/numbers"
  [[ -e $dir/going ]] || random_file going 20
  same "$(k exec -i "pod-$1" -c main -- sh -c 'rm -f /tmp/enough /tmp/said; cat > /www/going; echo there' < "$dir/going")" there
  going_mark="going-$RANDOM$RANDOM"
  : > "$dir/log/going-logs.out"
  start going-logs kubectl logs -f "pod-$1" -c main --tail=1
  wait_for 20 test -s "$dir/log/going-logs.out"
  forwarded "$1"
  : > "$dir/going-page"
  curl -sS --max-time 300 "http://127.0.0.1:${at[forwarded]}/going" | slowly > "$dir/going-page" &
  pid[going-page]=$!
  : > "$dir/going-exec"
  numbers | kubectl exec -i "pod-$1" -c main -- cat > "$dir/going-exec" 2> "$dir/log/going-exec.log" &
  pid[going-exec]=$!
  k exec "pod-$1" -c main -- sh -c \
    "(i=0; until [ -e /tmp/enough ]; do i=\$((i + 1)); echo $going_mark \$i > /tmp/say; sleep 0.1; done; echo \$i > /tmp/said) > /dev/null 2>&1 &"
  wait_for 20 more_than "$dir/going-exec" 0
  wait_for 20 more_than "$dir/going-page" 0
}
# numbers: one a line, until it is enough. slowly: passes on less than half a megabyte per second until then.
numbers() {
  local number=0
  until [[ -e $dir/enough ]]; do echo $((++number)) && sleep 0.1; done
  echo "$number" > "$dir/numbers"
}
slowly() {
  until [[ -e $dir/enough ]]; do head -c 50000 && sleep 0.1; done
  cat
}
page_goes_on() { more_than "$dir/going-page" $(($1 + 200000)) || cmp "$dir/going-page" "$dir/going"; }
more_than() { (($(stat -c %s "$1") > $2)); }
gone_on() {
  local said
  running going-exec || fail 'exec ended before it was told to'
  wait_for 20 more_than "$dir/going-exec" $(($(stat -c %s "$dir/going-exec") + 50))
  wait_for 20 more_than "$dir/log/going-logs.out" $(($(stat -c %s "$dir/log/going-logs.out") + 100))
  wait_for 20 page_goes_on "$(stat -c %s "$dir/going-page")"
  : > "$dir/enough"
  wait "${pid[going-exec]}" || fail "exec ended with status $?: $(cat "$dir/log/going-exec.log")"
  same "$(sha256sum < "$dir/going-exec")" "$(seq "$(cat "$dir/numbers")" | sha256sum)"
  wait "${pid[going-page]}" || fail "the download ended with status $?"
  same "$(hash_of "$dir/going-page")" "$(hash_of "$dir/going")"
  k exec "pod-$1" -c main -- touch /tmp/enough
  said=$(k exec "pod-$1" -c main -- sh -c 'until [ -s /tmp/said ]; do sleep 0.1; done; cat /tmp/said')
  wait_for 20 came_whole "$going_mark" "$dir/log/going-logs.out" "$(seq "$said" | sed "s/^/$going_mark /" | sha256sum)"
  running going-logs || fail 'kubectl logs -f ended by itself'
  unset 'pid[going-exec]' 'pid[going-page]'
  stop going-logs
  stop forward
  k exec "pod-$1" -c main -- rm /www/going
}

# parted N HOW: the shard of node-N's edge leaves by the function HOW, which gets both, while something goes on; then it
# comes back.
parted() {
  settled "$1"
  old=$(holder "$1")
  going "$1"
  began=$(now)
  "$2" "$1" "$old"
  gone_on "$1"
  let_go "$old"
  restart "$old"
}
# drained N: it is drained by order, and then stopped. terminated N: it is stopped as it is.
drained() {
  parted "$1" by_order
  ctl shard undrain "$old" > /dev/null
}
by_order() {
  ctl shard drain "$2" --wait --timeout 120s > /dev/null
  wait_for 5 elsewhere "$1" "$2"
  words="$2 had no edges after $(since "$began")"
  kill -TERM "${pid[$2]}"
}
terminated() { parted "$1" by_signal; }
by_signal() {
  kill -TERM "${pid[$2]}"
  wait_for 20 elsewhere "$1" "$2"
  words="node-$1 was elsewhere after $(since "$began")"
}
# settled N: waits until all shards are in the ring, node-N's edge is not at the apiserver's door, and exec works. An edge
# that has just seen shards die avoids them; one that has just started avoids nobody.
settled() {
  wait_for 60 all_in_the_ring
  stop "edge-$1"
  start_edge_on "$1"
  wait_for 20 elsewhere "$1" shard-1
  wait_for 20 works "$1"
}
all_in_the_ring() { (($(metric "${at[shard.admin]}" mesh_shard_ring_members) == 3)); }
elsewhere() { [[ -n $(holder "$1") && $(holder "$1") != "$2" ]]; }

# killed N: the shard of node-N's edge dies, and exec works again within 3 s.
killed() {
  local took
  settled "$1"
  old=$(holder "$1")
  crash "$old"
  began=$(now)
  wait_for 20 works "$1"
  took=$(($(now) - began))
  restart "$old"
  words+="${words:+, }$took ms"
  bound "$took" 3000 'the time until exec works, in ms,'
}

# --- what does not ----------------------------------------------------------------------------------------------------

# cut_off N: from one moment to the next nothing of node-N's edge gets through any more.
cut_off() {
  healthy "$1"
  within "node-$1" nft -f - << 'EOF'
table inet cut {
  chain out { type filter hook output priority 0; oifname != lo meta l4proto { tcp, udp } drop; }
  chain in { type filter hook input priority 0; iifname != lo meta l4proto { tcp, udp } drop; }
}
EOF
  says "$1" "link to edge/node-$1 is cut"
  within "node-$1" nft delete table inet cut
  heals "$1"
}
# edge_killed N: the edge's process dies; its host goes on. Over TCP the host says so, which QUIC has to find out.
edge_killed() {
  healthy "$1"
  crash "edge-$1"
  says "$1" "link to edge/node-$1 is cut|edge/node-$1 is not connected"
  start_edge_on "$1"
  heals "$1"
}
# healthy N: an exec that works, and how long it takes. says N REGEX: one that does not, and how it says so.
healthy() {
  wait_for 20 works "$1"
  began=$(now)
  k exec "pod-$1" -c main -- true
  usual=$(($(now) - began))
}
says() {
  began=$(now)
  words=$(refused k exec "pod-$1" -c main -- true)
  took=$(($(now) - began))
  [[ $words =~ $2 ]] || fail "no '$2' in: $words"
  bound "$took" 1000 'the time until exec says so, in ms,'
  words="after $took ms, where a good one takes $usual ms: $(tail -n 1 <<< "$words")"
}
heals() {
  began=$(now)
  wait_for 60 works "$1"
  words+="; healed after $(since "$began")"
}

# --- what is not needed -----------------------------------------------------------------------------------------------

# everything N: each way through the mesh once, but for those that take a Service.
everything() {
  verb_exec "$1"
  verb_stdin "$1"
  verb_cp "$1" 1 > /dev/null
  verb_forward "$1" 10 > /dev/null
  same "$(k logs "pod-$1" -c main --limit-bytes=6)" $'1\n2\n3'
  verb_node_proxy "$1"
  verb_pod_proxy "$1"
}
# control_away N: everything goes on without the apiserver that control follows, then without control as well, and with
# a control that has just started and cannot ask that apiserver. The Services must be node-N's.
control_away() {
  # kubelet asks that apiserver who may do what, and remembers the answer for some minutes.
  everything "$1"
  kill -STOP "${pid[apiserver-plain]}"
  everything_and_services "$1"
  crash control
  everything_and_services "$1"
  start control mesh-control --config "$dir/control.toml"
  wait_for 30 ready "${at[control.admin]}"
  everything_and_services "$1"
  kill -CONT "${pid[apiserver-plain]}"
  everything "$1"
  # Controllers that hear no node for 40 s take the pods there out of the Services, and back in when they hear them.
  wait_for 60 page_is_served "$1"
}
page_is_served() { [[ $(k get --raw /api/v1/namespaces/default/services/page:http/proxy/) == "hello from pod-$1" ]]; }
everything_and_services() {
  everything "$1"
  verb_service_proxy "$1"
}
