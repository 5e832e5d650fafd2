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

# holes POD COUNT: that many CONNECTs at the door to a port that swallows everything, 240 at once, so that their TLS
# handshakes do not count much; and one that kube-apiserver sends. All are answered within the bound, and nothing stays.
# Prints the slowest.
holes() {
  local pod=$1 count=$2 ip descriptors number began all=() most
  ip=$(k get pod "pod-$pod" -o 'jsonpath={.status.podIP}')
  within "node-$pod" nft -f - << 'EOF'
table inet hole { chain out { type filter hook output priority 0; tcp dport 81 drop; }; }
EOF
  descriptors=$(descriptors_of shard-1)
  began=$(now)
  refused k get --raw "/api/v1/namespaces/default/pods/pod-$pod:81/proxy/" > "$dir/hole"
  below "$(($(now) - began))" 10500 'the time that kube-apiserver waited, in ms,'
  has "$(cat "$dir/hole")" target-timeout
  began=$(now)
  for number in 1 2 3 4; do
    curl -s --parallel --parallel-immediate --parallel-max 60 --proxytunnel --proxy "https://$here:${at[egress]}" --proxy-cacert "$pki/egress.crt" \
      --proxy-cert "$pki/egress-client.crt" --proxy-key "$pki/egress-client.key" -o /dev/null \
      -w '%{http_connect} %{time_total}\n' "http://$ip:81/[1-$((count / 4))]" > "$dir/hole-$number" 2> "$dir/log/hole-$number.log" &
    all+=($!)
  done
  wait "${all[@]}" || true
  same "$(awk '{ print $1 }' "$dir"/hole-? | sort | uniq -c | xargs)" "$((count / 4 * 4)) 504"
  most=$(awk '$2 > most { most = $2 } END { print most }' "$dir"/hole-?)
  below "$most" 10 'the slowest answer, in seconds,'
  wait_for 20 nobody_inside
  wait_for 20 no_more_descriptors shard-1 "$descriptors"
  within "node-$pod" nft delete table inet hole
  echo "$((count / 4 * 4)) answered in $(since "$began"), the slowest after $most s; $descriptors descriptors before and after"
}
descriptors_of() { find "/proc/${pid[$1]}/fd" -mindepth 1 | wc -l; }
no_more_descriptors() { (($(descriptors_of "$1") <= $2)); }
nobody_inside() { [[ $(metric "${at[shard.admin]}" 'mesh_shard_door_connections{door="egress"}') == 0 ]]; }

# readers POD COUNT: that many `logs -f`, one of which is stopped while a megabyte is said; the others have them all
# before long, and the stopped one when it goes on. Prints how long the others took.
readers() {
  local pod=$1 count=$2 mark="flood-$RANDOM$RANDOM" number wanted began took
  wanted=$(lines "$mark" 10000 | sha256sum)
  for ((number = 0; number < count; number++)); do
    : > "$dir/log/reader-$number.out"
    GOGC=20 GOMAXPROCS=1 start "reader-$number" kubectl logs -f "pod-$pod" -c main --tail=1
  done
  for ((number = 0; number < count; number++)); do wait_for 60 test -s "$dir/log/reader-$number.out"; done
  kill -STOP "${pid[reader-0]}"
  began=$(now)
  say "$pod" "$mark" 10000
  for ((number = 1; number < count; number++)); do
    wait_for 60 came_whole "$mark" "$dir/log/reader-$number.out" "$wanted"
  done
  took=$(since "$began")
  kill -CONT "${pid[reader-0]}"
  wait_for 60 came_whole "$mark" "$dir/log/reader-0.out" "$wanted"
  for ((number = 0; number < count; number++)); do
    stop "reader-$number"
    rm "$dir/log/reader-$number.out"
  done
  echo "the others had 1 MB each after $took"
}
