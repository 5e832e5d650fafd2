# Sourced by kube.sh: what kubectl shows when something is away.
# shellcheck shell=bash

works() { [[ $(patience=5 k exec "pod-$1" -c main -- echo works) == works ]]; }
works_not() { ! works "$1" 2> /dev/null; }

# cut_off N: nothing of node-N's edge gets through any more, and exec says so, soon. Prints what it says.
cut_off() {
  local began took words
  within "node-$1" nft -f - << 'EOF'
table inet cut {
  chain out { type filter hook output priority 0; meta l4proto udp drop; }
  chain in { type filter hook input priority 0; meta l4proto udp drop; }
}
EOF
  # The shard has to hear nothing for a while before it knows.
  wait_for 40 works_not "$1"
  began=$(now)
  words=$(refused k exec "pod-$1" -c main -- true)
  took=$(($(now) - began))
  has "$words" "node-$1"
  has "$words" offline
  below "$took" 1000 'the refusal, in ms,'
  within "node-$1" nft delete table inet cut
  began=$(now)
  wait_for 60 works "$1"
  echo "after $took ms: $(tail -n 1 <<< "$words"); healed after $(since "$began")"
}

# control_away N: everything goes on without control, and without the apiserver that control follows.
control_away() {
  kill -STOP "${pid[apiserver-plain]}"
  verb_exec "$1"
  verb_pod_proxy "$1"
  kill -CONT "${pid[apiserver-plain]}"
  crash control
  verb_exec "$1"
  verb_pod_proxy "$1"
  verb_service_proxy "$1"
  start control mesh-control --config "$dir/control.toml"
  wait_for 30 ready "${at[control.admin]}"
}
