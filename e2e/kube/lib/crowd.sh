# Sourced by kube.sh: many at once, and what happens when somebody stops reading.
# shellcheck shell=bash

# memory: what all of it takes now, in KiB; pages that processes share are counted once.
memory() { cat /proc/[0-9]*/smaps_rollup 2> /dev/null | awk '$1 == "Pss:" { sum += $2 } END { print sum }' || true; }
enough_memory() { below "$1" $((4 * 1024 * 1024)) 'memory in KiB'; }

# crowd POD COUNT: that many `exec` at once. All of them stand before the first may end; then each brings its own number
# and some lines. Prints how long it took until all stood, what they take then, and how long until all had ended.
crowd() {
  local pod=$1 count=$2 number began stood kib all=()
  k exec "pod-$pod" -c main -- sh -c 'rm -rf /tmp/crowd && mkdir /tmp/crowd && mkfifo /tmp/crowd/gate'
  began=$(now)
  for ((number = 0; number < count; number++)); do
    # Many at once on one machine: a small heap each, and one processor.
    GOGC=20 GOMAXPROCS=1 kubectl exec "pod-$pod" -c main -- sh -c \
      "touch /tmp/crowd/$number; cat /tmp/crowd/gate; echo $number; seq 1000" > "$dir/crowd-$number" 2> "$dir/crowd-$number.err" &
    all+=($!)
  done
  wait_for 120 stands "$pod" "$count"
  stood=$(since "$began")
  kib=$(memory)
  enough_memory "$kib"
  # An end of file for everybody who waits at the gate.
  k exec "pod-$pod" -c main -- sh -c ': > /tmp/crowd/gate'
  wait "${all[@]}" || true
  for ((number = 0; number < count; number++)); do
    same "$(sha256sum < "$dir/crowd-$number")" "$({ echo "$number" && seq 1000; } | sha256sum)"
    rm "$dir/crowd-$number" "$dir/crowd-$number.err"
  done
  echo "all stood after $stood with $(mib "$kib") for everything, and had ended after $(since "$began")"
}
stands() { [[ $(k exec "pod-$1" -c main -- sh -c 'ls /tmp/crowd | grep -c [0-9]') == "$2" ]]; }

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
