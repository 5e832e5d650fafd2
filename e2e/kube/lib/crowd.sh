# Sourced by kube.sh: many at once, and what happens when somebody stops reading.
# shellcheck shell=bash

# memory: what all of it takes now, in KiB; pages that processes share are counted once.
memory() { cat /proc/[0-9]*/smaps_rollup 2> /dev/null | awk '$1 == "Pss:" { sum += $2 } END { print sum }' || true; }
enough_memory() { below "$1" $((4 * 1024 * 1024)) 'memory in KiB'; }

# crowd POD COUNT: that many `exec` at once, half of them over WebSocket and half over SPDY. All of them stand before the
# first may end; then each brings its own number and some lines. Prints how long it took until all stood, what they take
# then, and how long until all had ended.
crowd() {
  local pod=$1 count=$2 number began stood kib status=0
  k exec "pod-$pod" -c main -- sh -c 'rm -rf /tmp/crowd && mkdir /tmp/crowd && mkfifo /tmp/crowd/gate'
  mkdir -p "$dir/crowd"
  began=$(now)
  kube-crowd "pod-$pod" -c main --count "$count" --into "$dir/crowd" -- \
    sh -c 'touch /tmp/crowd/{}; cat /tmp/crowd/gate; echo {}; seq 1000' 2> "$dir/log/crowd.log" &
  wait_for 120 stands "$pod" "$count"
  stood=$(since "$began")
  kib=$(memory)
  enough_memory "$kib"
  # An end of file for everybody who waits at the gate.
  k exec "pod-$pod" -c main -- sh -c ': > /tmp/crowd/gate'
  wait "$!" || status=$?
  same "$status" 0
  for ((number = 0; number < count; number++)); do
    same "$(sha256sum < "$dir/crowd/$number")" "$({ echo "$number" && seq 1000; } | sha256sum)"
  done
  rm -r "$dir/crowd"
  echo "all stood after $stood with $(mib "$kib") for everything, and had ended after $(since "$began")"
}
stands() { [[ $(k exec "pod-$1" -c main -- sh -c 'ls /tmp/crowd | grep -c [0-9]') == "$2" ]]; }

# holes POD BY-TCP BY-UDS: that many CONNECTs at the doors to a port that swallows everything; and one that kube-apiserver
# sends. All are answered within the bound, and nothing stays, if it was
# all_at_home before. Prints the slowest of each.
holes() {
  local pod=$1 ip before began words most alone
  ip=$(k get pod "pod-$pod" -o 'jsonpath={.status.podIP}')
  within "node-$pod" nft -f - << 'EOF'
table inet hole { chain out { type filter hook output priority 0; tcp dport 81 drop; }; }
EOF
  before=$(what_there_is "$pod")
  began=$(now)
  refused k get --raw "/api/v1/namespaces/default/pods/pod-$pod:81/proxy/" > "$dir/hole"
  alone=$(($(now) - began))
  bound "$alone" 10000 'the time that kube-apiserver waited, in ms,'
  has "$(cat "$dir/hole")" target-timeout
  began=$(now)
  most=$(holes_by_tcp "$ip" "$2")
  # An edge takes 1,024 streams at once.
  words=$(mesh-loadtest dials --socket "$dir/egress.sock" --target "$ip:81" --count "$3" --at-once 900)
  same "$(figure 504 "$words")" "$3"
  bound "$(figure max_ms "$words")" 10000 'the slowest answer by UDS, in ms,'
  words="$(($2 + $3)) answered in $(since "$began"), the slowest after $most s by TCP and $(figure max_ms "$words") ms by UDS"
  wait_for 30 nothing_more "$pod" "$before" || fail "before: $before; now: $(what_there_is "$pod")"
  within "node-$pod" nft delete table inet hole
  echo "$words, that of kube-apiserver after $alone ms; before $before; after $(what_there_is "$pod")"
}
# holes_by_tcp IP COUNT: 240 at once, so that their TLS handshakes do not count much; prints how long the slowest took.
holes_by_tcp() {
  local number all=() most
  for number in 1 2 3 4; do
    curl -s --parallel --parallel-immediate --parallel-max 60 --proxytunnel --proxy "https://$here:${at[egress]}" --proxy-cacert "$pki/egress.crt" \
      --proxy-cert "$pki/egress-client.crt" --proxy-key "$pki/egress-client.key" -o /dev/null \
      -w '%{http_connect} %{time_total}\n' "http://$1:81/[1-$(($2 / 4))]" > "$dir/hole-$number" 2> "$dir/log/hole-$number.log" &
    all+=($!)
  done
  # curl says by its status that it was refused.
  wait "${all[@]}" || true
  same "$(awk '{ print $1 }' "$dir"/hole-? | sort | uniq -c | xargs)" "$2 504"
  most=$(awk '$2 > most { most = $2 } END { print most }' "$dir"/hole-?)
  bound "$most" 10 'the slowest answer by TCP, in seconds,'
  echo "$most"
}
# all_at_home: every shard hears control and the others, and every edge is at its owner. An edge that saw a shard die goes
# home some minute later, and takes tasks along; one that has just started avoids nobody.
all_at_home() {
  local number
  wait_for 60 at_rest
  for number in 1 2 3; do
    stop "edge-$number"
    start_edge_on "$number"
  done
  for number in 1 2 3; do wait_for 20 works "$number"; done
  wait_for 120 at_rest
}
at_rest() {
  local name admin others=0
  for name in "${!pid[@]}"; do [[ $name != shard-* ]] || others=$((others + 1)); done
  others=$((others - 1))
  for name in "${!pid[@]}"; do
    [[ $name == shard-* ]] || continue
    admin=${at[${name/%shard-1/shard}.admin]}
    (($(metric "$admin" mesh_shard_control_connected) == 1 && $(metric "$admin" mesh_shard_peers) == others &&
      $(metric "$admin" mesh_shard_tunnels_unowned) == 0 && $(metric "$admin" mesh_shard_tunnels_leaving) == 0)) || return 1
  done
}
# what_there_is N: sockets and other descriptors, and tasks, of all whom a dial to node-N passes. kube-apiserver keeps
# connections for ninety seconds, so that there may be less later. nothing_more N BEFORE: whether there is not more.
what_there_is() {
  local name
  {
    for name in shard-1 shard-2 shard-3; do
      [[ -z ${pid[$name]:-} ]] || echo "$name $(descriptors_of "$name") descriptors $(tasks_of "${at[${name/%shard-1/shard}.admin]}")"
    done
    echo "edge-$1 $(descriptors_of "edge-$1") descriptors $(host=10.200.$1.2 tasks_of "${at[node-$1]}")"
  } | paste -sd,
}
tasks_of() { echo "$(metric "$1" mesh_process_tasks) tasks"; }
descriptors_of() { find "/proc/${pid[$1]}/fd" -mindepth 1 | wc -l; }
nothing_more() { paste <(figures <<< "$2") <(what_there_is "$1" | figures) | awk '$2 > $1 { more = 1 } END { exit more }'; }
figures() { grep -o ' [0-9]*'; }

# readers POD COUNT: that many `logs -f`, and a megabyte that is said twice: once while all of them read, and once while
# one of them is stopped, which the others do not notice; the stopped one has it all when it goes on. Prints how long it
# took all but that one until they had it.
readers() {
  local pod=$1 count=$2 number all_read one_stopped
  for ((number = 0; number < count; number++)); do
    : > "$dir/log/reader-$number.out"
    GOGC=20 GOMAXPROCS=1 start "reader-$number" kubectl logs -f "pod-$pod" -c main --tail=1
  done
  for ((number = 0; number < count; number++)); do wait_for 60 test -s "$dir/log/reader-$number.out"; done
  all_read=$(flood "$pod" "$count")
  kill -STOP "${pid[reader-0]}"
  one_stopped=$(flood "$pod" "$count")
  kill -CONT "${pid[reader-0]}"
  wait_for 60 same_end "$count"
  # Noise on a busy machine is one thing, a queue behind the one who does not read another.
  bound "$one_stopped" $((all_read * 3 / 2 + 2000)) 'how long the others waited with one stopped, in ms,'
  for ((number = 0; number < count; number++)); do
    stop "reader-$number"
    rm "$dir/log/reader-$number.out"
  done
  echo "the others had 1 MB each after $one_stopped ms, and after $all_read ms while all were reading"
}
# flood POD COUNT: how long it takes until all but the first have what is said now, in ms.
flood() {
  local mark="flood-$RANDOM$RANDOM" number wanted began
  wanted=$(lines "$mark" 10000 | sha256sum)
  began=$(now)
  say "$1" "$mark" 10000
  for ((number = 1; number < $2; number++)); do
    wait_for 60 came_whole "$mark" "$dir/log/reader-$number.out" "$wanted" || {
      # A kubelet that cannot watch a file ends `logs -f` as if the container had.
      kill -0 "${pid[reader-$number]}" 2> /dev/null || fail "logs -f ended by itself: does this machine run out of \
fs.inotify.max_user_instances ($(< /proc/sys/fs/inotify/max_user_instances))?"
      return 1
    }
  done
  echo $(($(now) - began))
}
# same_end COUNT: whether the first and the last have read the same.
same_end() { [[ $(tail -n 10000 "$dir/log/reader-0.out" | sha256sum) == $(tail -n 10000 "$dir/log/reader-$(($1 - 1)).out" | sha256sum) ]]; }
