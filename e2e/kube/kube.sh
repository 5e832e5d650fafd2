#!/usr/bin/env bash
# kube: a real Kubernetes, whose kubelets and pods nobody reaches but through the mesh; every verb of kubectl.
#
# EGRESS says by which ways the verbs are tried: `none` (a direct route, to compare with), `uds`, `tcp`; `uds tcp` if
# it says nothing. With QUICK=1, for a machine that has more to do, one shard is tried by the last way and three by the
# first, files and crowds are smaller, and times are printed and not compared with what is promised.
# PARTS says what of it, in this order: `verbs crowd shards drain trouble holes scaling`; all if it says nothing, and with
# QUICK=1 all but `scaling`.
# It takes root, about 3 GiB of memory, and the programs that scripts/kube-binaries names.
set -euo pipefail

# Everything below runs in namespaces of its own. Whatever becomes of it, the kernel ends its processes, unmounts its
# mounts and takes down its network with the last of them; only control groups are left to remove.
if [[ -z ${CAUSEWAY_CGROUP:-} ]]; then
  cd "$(dirname "$0")/.."
  if [[ $(id -u) != 0 ]]; then
    echo 'A cluster of containers takes root: sudo make e2e-kube' >&2
    exit 1
  fi
  ../scripts/need busybox cc conntrack containerd curl etcd ip iptables nft openssl ptp runc script socat
  KUBE_BIN=$(../scripts/kube-binaries)
  TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/kube.XXXX")
  export KUBE_BIN TMPDIR CAUSEWAY_CGROUP=causeway-$$
  chmod 755 "$TMPDIR"
  status=0
  unshare --net --mount --pid --fork --mount-proc --kill-child=TERM bash kube/kube.sh &
  inner=$!
  trap 'kill "$inner" 2> /dev/null || true' INT TERM
  # A signal ends the first wait early; the second one then sees how it ended.
  wait "$inner" || wait "$inner" || status=$?
  find /sys/fs/cgroup -depth -path "/sys/fs/cgroup/*$CAUSEWAY_CGROUP-*" -type d -exec rmdir {} + || true
  [[ -n ${CAUSEWAY_KEEP:-} ]] || rm -rf "$TMPDIR"
  exit "$status"
fi

ip link set lo up
ip address add 10.200.0.1/32 dev lo
export host=10.200.0.1
source "$(dirname "$0")/../lib.sh"
# shellcheck source=e2e/kube/lib/cluster.sh
source "$(dirname "$0")/lib/cluster.sh"
# shellcheck source=e2e/kube/lib/node.sh
source "$(dirname "$0")/lib/node.sh"
# shellcheck source=e2e/kube/lib/mesh.sh
source "$(dirname "$0")/lib/mesh.sh"
# shellcheck source=e2e/kube/lib/verbs.sh
source "$(dirname "$0")/lib/verbs.sh"
# shellcheck source=e2e/kube/lib/crowd.sh
source "$(dirname "$0")/lib/crowd.sh"
# shellcheck source=e2e/kube/lib/trouble.sh
source "$(dirname "$0")/lib/trouble.sh"
# shellcheck source=e2e/kube/lib/scaling.sh
source "$(dirname "$0")/lib/scaling.sh"
PATH=$KUBE_BIN:$PATH
# What fails inside of $(...) fails the story.
shopt -s inherit_errexit
# There are many logs.
: "${CAUSEWAY_TAIL:=3}"
# A cluster has the machine busy by itself. What is promised is measured, and not waited for.
: "${CAUSEWAY_PATIENCE:=4}"
# shellcheck disable=SC2034 # read in lib/node.sh
for cni in /usr/lib/cni /opt/cni/bin; do [[ ! -x $cni/ptp ]] || break; done

# The shims of containers are nobody's children; this shell is the first process of its namespace and ends them all.
clean_up() { [[ $$ != 1 ]] || kill -KILL -1; }

# Before kube-apiserver proxies to a node (nodes/x/proxy) by its host name, it looks the name up itself, and refuses if
# it finds nothing, although it dials by the name only. So the names have addresses, which lead nowhere; but for that of
# node-4, which is in the cloud.
{
  echo '127.0.0.1 localhost'
  for number in 1 2 3; do echo "192.0.2.$number node-$number"; done
  echo '10.200.4.2 node-4'
} > "$dir/hosts"
mount --bind "$dir/hosts" /etc/hosts

read -ra ways <<< "${EGRESS:-uds tcp}"
parts=${PARTS:-verbs crowd shards drain trouble holes}
if [[ -z ${PARTS:-}${QUICK:-} ]]; then parts+=' scaling'; fi
wants() { [[ " $parts " == *" $1 "* ]]; }
# bound GOT LIMIT WHAT: a time that is promised. A machine that has more to do breaks it, so that QUICK only prints it.
bound() { [[ -n ${QUICK:-} ]] || below "$@"; }
# usually VALUE QUICK-VALUE
usually() { if [[ -z ${QUICK:-} ]]; then echo "$1"; else echo "$2"; fi; }

step 'images, made here: busybox, and socat with the libraries that it is linked to'
image pause '["/bin/sleep","2147483647"]'
image box '["/bin/sh"]'
image answer '["/bin/sh"]' "$(command -v socat)" "$(dirname "$0")/lib/answer"
ok "$(cd "$dir/images" && du -ch ./*.tar | tail -n 1 | cut -f1)"

step 'etcd, kube-apiserver, controllers and scheduler'
credentials
store
# It also asks the pods of aggregated APIs themselves: there is no kube-proxy here for the addresses of Services.
apiserver plain "$here" 6443 --enable-aggregator-routing
use plain
controllers --horizontal-pod-autoscaler-sync-period 2s
ok "$(kubectl version -o json | grep -o '"gitVersion": "[^"]*"' | tail -n 1 | cut -d'"' -f4)"

step 'three nodes, two of which have the same address at different sites'
node 1 10.99.0.5
node 2 10.99.0.5
node 3 10.99.0.6
nodes_ready 1 2 3
same "$(k get nodes -o 'jsonpath={.items[*].status.addresses[?(@.type=="InternalIP")].address}')" '10.99.0.5 10.99.0.5 10.99.0.6'
ok "$(k get node node-1 -o 'jsonpath={.status.nodeInfo.containerRuntimeVersion}, kernel {.status.nodeInfo.kernelVersion}')"

step 'a pod on each'
certificate_of_answer
pods 1 2 3
services_of_pods 1
ok "$(k get pods -o 'jsonpath={.items[*].status.podIP}')"

step 'nobody here reaches a kubelet or a pod, and kubectl neither'
pod_ip=$(k get pod pod-1 -o 'jsonpath={.status.podIP}')
for target in 10.99.0.5:10250 10.200.1.2:10250 "$pod_ip:8080"; do
  if curl -sk --max-time 2 "http://$target/"; then fail "$target answers"; fi
done
words=$(refused k logs pod-1 -c main --tail=1)
has "$words" node-1
ok "$(tail -n 1 <<< "$words")"

# verbs WAY N MB-CP MB-FORWARD [TRANSPORT...]: all of them at node-N, over WebSocket and over SPDY if none is named.
verbs() {
  local way words cp=$3 forward=$4 transports=("${@:5}")
  if [[ ${#transports[@]} == 0 ]]; then transports=(websocket spdy); fi
  step "$1: logs, 20,000 lines by hash"
  verb_logs "$2"
  ok
  step "$1: logs -f, 5,000 lines said while it looks"
  verb_follow "$2"
  ok
  for way in "${transports[@]}"; do
    step "$1: exec over $way: output, exit codes, 10 MB of standard input there and back, a terminal"
    over "$way" verb_exec "$2"
    over "$way" verb_exit_codes "$2"
    over "$way" verb_stdin "$2"
    over "$way" verb_tty "$2"
    ok
    step "$1: attach over $way"
    over "$way" verb_attach "$2"
    ok
    step "$1: cp over $way"
    words=$(over "$way" verb_cp "$2" "$cp")
    ok "$words"
    step "$1: port-forward over $way"
    words=$(over "$way" verb_forward "$2" "$forward")
    ok "$words"
    step "$1: run --rm -i over $way"
    over "$way" verb_run "$2"
    ok
  done
  step "$1: get --raw nodes/x/proxy, pod proxy"
  verb_node_proxy "$2"
  verb_pod_proxy "$2"
  ok
}
# verbs_of_services WAY N: for the pod behind the Services.
verbs_of_services() {
  step "$1: service proxy, an admission webhook and an aggregated API whose pod runs on an edge"
  verb_service_proxy "$2"
  verb_webhook "$2"
  verb_aggregated "$2"
  ok
}

step 'a second apiserver with a direct route to node-1'
place direct
wire - 10.201.0.2/30 direct "$direct/30"
within direct ip route add "$here/32" via 10.201.0.2
wire direct 10.201.1.1/30 node-1 10.201.1.2/30
within direct ip route add default via 10.201.1.2
apiserver direct "$direct" 6443 --kubelet-preferred-address-types InternalIP
ok

verbs_by() {
  if [[ -z ${QUICK:-} ]]; then verbs "$1" 1 100 1000; else verbs "$1" 1 10 100 websocket; fi
  verbs_of_services "$1" 1
  if [[ $1 == direct ]]; then return; fi
  if [[ -z ${QUICK:-} ]]; then
    verbs "$1, the other site" 2 10 100
  else
    step "$1, the other site: logs, exec, cp, port-forward, get --raw"
    everything 2
    ok
  fi
}
for way in "${ways[@]}"; do
  case $way in
    none) use direct ;;
    uds | tcp)
      # The first of the two brings the mesh.
      [[ -n ${pid[control]:-} ]] || {
        step 'a mesh: control and a shard beside the apiserver, an edge on each node'
        mesh 1 2 3
        ok
      }
      step "an apiserver that goes through the egress door over $way"
      if [[ $way == uds ]]; then apiserver uds "$here" 6444; else apiserver tcp "$here" 6445; fi
      use "$way"
      ok
      ;;
    *) fail "EGRESS is none, uds or tcp, not $way" ;;
  esac
  if wants verbs && [[ -z ${QUICK:-} || $way == "${ways[-1]}" ]]; then verbs_by "${way/none/direct}"; fi
done

# median WHAT: of exec by each way, which is to be nearly that by a direct route.
median() {
  local name names=(direct)
  step "exec -- true, the median of $(usually 30 5) by each way, $1"
  for name in "${ways[@]}"; do [[ $name == none ]] || names+=("$name"); done
  words=$(exec_times 1 "$(usually 30 5)" "${names[@]}")
  for name in "${names[@]}"; do
    bound "$(figure "$name" "$words")" "$(awk -v ms="$(figure direct "$words")" 'BEGIN { print ms * 1.1 + 0.1 }')" "exec by $name"
  done
  ok "$words ms"
}

if wants crowd; then
  median 'one shard'

  step "$(usually 200 50) exec at once"
  if command -v kube-crowd > /dev/null; then
    words=$(crowd 1 "$(usually 200 50)")
    ok "$words"
  else
    not_here "$KUBE_BIN has no kube-crowd"
  fi

  step "$(usually 50 10) logs -f, one of whom is stopped"
  words=$(readers 1 "$(usually 50 10)")
  ok "$words"
fi

# From here on everything is about the mesh.
[[ -n ${pid[control]:-} ]] || exit 0

step 'meshctl kube check finds nothing wrong, by the socket and with the certificate of kube-apiserver'
door_works --door "$dir/egress.sock"
door_works --door "$here:${at[egress]}" --door-ca "$pki/egress.crt" --door-cert "$pki/egress-client.crt" \
  --door-key "$pki/egress-client.key"
ok

if wants shards || wants drain || wants trouble; then
  step 'two more shards, which have all edges then; the apiservers still know the first one only'
  more_shards
  ok "node-1 is at $(holder 1), node-2 at $(holder 2), node-3 at $(holder 3)"
fi

if wants shards; then
  for way in "${ways[@]}"; do
    use "${way/none/direct}"
    if [[ $way == none || -n ${QUICK:-} && $way != "${ways[0]}" ]]; then continue; fi
    if [[ -z ${QUICK:-} ]]; then verbs "$way, three shards" 1 10 100; else verbs "$way, three shards" 1 10 100 spdy; fi
    verbs_of_services "$way, three shards" 1
  done
  [[ -n ${QUICK:-} ]] || median 'three shards'
fi

if wants drain; then
  step 'a shard is drained, and stopped, while exec, logs -f and port-forward run'
  drained 1
  ok "$words"
  if [[ -z ${QUICK:-} ]]; then
    step 'a shard is stopped while exec, logs -f and port-forward run'
    terminated 1
    ok "$words"
  fi
  step 'a shard is killed: the next exec works'
  words=
  for ((round = 0; round < $(usually 10 1); round++)); do killed 1; done
  ok "after $words"
fi

if wants trouble; then
  step 'the link of an edge is cut: exec says so at once'
  cut_off 3
  ok "$words"
  step 'an edge dies: exec says so at once'
  edge_killed 3
  ok "$words"
  step 'the apiserver that control follows is away, then control is: everything goes on'
  control_away 1
  ok
fi

if wants holes; then
  step "$(usually 10000 480) CONNECTs to a port that swallows everything, some by TCP and TLS, the others by UDS"
  all_at_home
  words=$(holes 1 "$(usually 480 240)" "$(usually 9520 240)")
  ok "$words"
fi

step 'what it takes'
kib=$(memory)
enough_memory "$kib"
ok "$(mib "$kib") for everything"

if wants scaling; then scaling; fi
