# Sourced by kube.sh: everything that kubectl does through an apiserver to a node. Each function looks at the bytes that
# came, because a stream that was cut short may end with status 0.
# shellcheck shell=bash

k() { timeout "${patience:-60}" kubectl "$@"; }

# over websocket|spdy COMMAND...: exec, attach, cp and port-forward in this way; kubectl has no other fallback then.
over() {
  local way=$1 flag=true
  shift
  if [[ $way == spdy ]]; then flag=false; fi
  KUBECTL_REMOTE_COMMAND_WEBSOCKETS=$flag KUBECTL_PORT_FORWARD_WEBSOCKETS=$flag "$@"
}

# --- pods ---------------------------------------------------------------------------------------------------------

# pods N...: pod-N on node-N. Its first container serves a page at 8080, prints 20,000 lines and then what is written to
# /tmp/say; `echo` gives back its standard input; `answer` speaks TLS at 8443.
pods() {
  local number
  for number in "$@"; do
    cat << EOF
---
apiVersion: v1
kind: Pod
metadata: {name: pod-$number, labels: {app: story}}
spec:
  nodeSelector: {kubernetes.io/hostname: node-$number}
  terminationGracePeriodSeconds: 0
  volumes: [{name: pair, secret: {secretName: answer}}]
  containers:
  - name: main
    image: local/box:1
    imagePullPolicy: Never
    command: [sh, -c, 'echo "hello from pod-$number" > /www/index.html; httpd -p 8080 -h /www; mkfifo /tmp/say; seq 20000; exec cat <> /tmp/say']
    readinessProbe: {httpGet: {port: 8080}, periodSeconds: 1}
  - name: echo
    image: local/box:1
    imagePullPolicy: Never
    stdin: true
    command: [cat]
  - name: answer
    image: local/answer:1
    imagePullPolicy: Never
    volumeMounts: [{name: pair, mountPath: /pair}]
    command: [socat, 'OPENSSL-LISTEN:8443,fork,reuseaddr,cert=/pair/tls.crt,key=/pair/tls.key,verify=0', 'EXEC:/bin/answer']
    readinessProbe: {tcpSocket: {port: 8443}, periodSeconds: 1}
EOF
  done | k apply -f - > /dev/null
  for number in "$@"; do patience=250 k wait --for=condition=Ready "pod/pod-$number" --timeout=240s > /dev/null; done
}

# services_of_pods N: Services `page` and `answer` that lead to pod-N.
services_of_pods() {
  local number=$1
  k label --overwrite pod "pod-$number" serves=yes > /dev/null
  k apply -f - > /dev/null << 'EOF'
apiVersion: v1
kind: Service
metadata: {name: page}
spec: {selector: {serves: 'yes'}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: answer}
spec: {selector: {serves: 'yes'}, ports: [{port: 443, targetPort: 8443}]}
EOF
  wait_for 20 has_endpoints answer
}
has_endpoints() { [[ -n $(k get endpointslices -l "kubernetes.io/service-name=$1" -o 'jsonpath={.items[*].endpoints[*].addresses}') ]]; }

# --- logs ---------------------------------------------------------------------------------------------------------

verb_logs() {
  same "$(k logs "pod-$1" -c main --tail=-1 | sed -n 1,20000p | sha256sum)" "$(seq 20000 | sha256sum)"
  same "$(k logs "pod-$1" -c main --limit-bytes=6)" $'1\n2\n3'
}

# lines MARK COUNT: numbered lines of a hundred bytes. say POD MARK COUNT: the pod prints them.
lines() { seq "$2" | sed "s/\$/ $(printf '%080d' 0)/; s/^/$1 /"; }
say() { k exec "pod-$1" -c main -- sh -c "$(declare -f lines); lines $2 $3 > /tmp/say"; }
# came_whole MARK FILE HASH: whether all lines of that mark have come, as they were said.
came_whole() { [[ $(grep "^$1 " "$2" | sha256sum) == "$3" ]]; }

verb_follow() {
  local mark="said-$RANDOM$RANDOM" wanted
  wanted=$(lines "$mark" 5000 | sha256sum)
  : > "$dir/log/follow.out"
  start follow kubectl logs -f "pod-$1" -c main --tail=1
  wait_for 20 test -s "$dir/log/follow.out"
  say "$1" "$mark" 5000
  wait_for 20 came_whole "$mark" "$dir/log/follow.out" "$wanted"
  running follow || fail 'kubectl logs -f ended by itself'
  stop follow
}

# --- exec ---------------------------------------------------------------------------------------------------------

verb_exec() {
  same "$(k exec "pod-$1" -c main -- sh -c 'echo out; echo err >&2' 2> "$dir/stderr")" out
  same "$(cat "$dir/stderr")" err
}

verb_exit_codes() {
  local wanted status
  for wanted in 0 1 42 255; do
    status=0
    k exec "pod-$1" -c main -- sh -c "exit $wanted" 2> /dev/null || status=$?
    same "$status" "$wanted"
  done
}

# 10 MB in, and the same out again, with nothing missing at either end.
verb_stdin() {
  [[ -e $dir/ten ]] || random_file ten 10
  same "$(k exec -i "pod-$1" -c main -- sha256sum < "$dir/ten" | cut -d' ' -f1)" "$(hash_of "$dir/ten")"
  same "$(k exec -i "pod-$1" -c main -- cat < "$dir/ten" | sha256sum | cut -d' ' -f1)" "$(hash_of "$dir/ten")"
}

verb_tty() {
  local words
  words=$(timeout 30 script -qec "stty rows 33 cols 77; kubectl exec -it pod-$1 -c main -- sh -c 'tty; sleep 1; stty size'" \
    /dev/null < /dev/null)
  has "$words" /dev/pts/
  has "$words" '33 77'
}

# The first container's output reaches who is attached; the second gives back what it is told.
verb_attach() {
  local mark="told-$RANDOM$RANDOM" wanted
  wanted=$(lines "$mark" 2000 | sha256sum)
  : > "$dir/log/attach.out"
  start attach kubectl attach "pod-$1" -c main
  # Nothing tells when the attachment stands, so a word is said until it comes.
  wait_for 20 heard "$1" "$mark-first" attach
  say "$1" "$mark" 2000
  wait_for 20 came_whole "$mark" "$dir/log/attach.out" "$wanted"
  stop attach

  # Held open at both ends, so that there is never an end of file.
  rm -f "$dir/attach-in"
  mkfifo "$dir/attach-in"
  timeout 20 kubectl attach -i "pod-$1" -c echo <> "$dir/attach-in" > "$dir/attached" 2> /dev/null &
  pid[attach-echo]=$!
  echo "back-$mark" > "$dir/attach-in"
  wait_for 15 grep -qx "back-$mark" "$dir/attached"
  stop attach-echo
}
heard() {
  grep -q "$2" "$dir/log/$3.out" && return
  k exec "pod-$1" -c main -- sh -c "echo '$2' > /tmp/say"
  grep -q "$2" "$dir/log/$3.out"
}

# verb_cp POD MB: a file there and back, by hash at both ends; prints the rates.
verb_cp() {
  local hash began there back
  [[ -e $dir/cp-$2 ]] || random_file "cp-$2" "$2"
  hash=$(hash_of "$dir/cp-$2")
  began=$(now)
  patience=300 k cp -c main "$dir/cp-$2" "pod-$1:/tmp/cp-$2"
  there=$(($(now) - began))
  same "$(k exec "pod-$1" -c main -- sha256sum "/tmp/cp-$2" | cut -d' ' -f1)" "$hash"
  began=$(now)
  patience=300 k cp -c main "pod-$1:/tmp/cp-$2" "$dir/cp-back" > /dev/null
  back=$(($(now) - began))
  same "$(hash_of "$dir/cp-back")" "$hash"
  rm "$dir/cp-back"
  k exec "pod-$1" -c main -- rm "/tmp/cp-$2"
  echo "$2 MB there at $(($2 * 1000 / there)) MB/s, back at $(($2 * 1000 / back)) MB/s"
}

verb_run() {
  local words="run-$RANDOM"
  same "$(k run "$words" --image=local/box:1 --image-pull-policy=Never --restart=Never --rm -i --quiet \
    --overrides="{\"spec\":{\"nodeSelector\":{\"kubernetes.io/hostname\":\"node-$1\"}}}" -- cat <<< "$words and back")" \
    "$words and back"
  same "$(k get pod "$words" --ignore-not-found)" ''
}

# --- port-forward -------------------------------------------------------------------------------------------------

# forwarded POD: starts `kubectl port-forward` to its page; the port here is at[forwarded].
forwarded() {
  : > "$dir/log/forward.out"
  start forward kubectl port-forward "pod/pod-$1" :8080
  wait_for 20 grep -q '^Forwarding from 127' "$dir/log/forward.out"
  at[forwarded]=$(sed -n 's/^Forwarding from 127.0.0.1:\([0-9]*\) .*/\1/p' "$dir/log/forward.out")
}

# verb_forward POD MB: 10 connections at once that bring that much together, each compared by hash; prints the rate.
verb_forward() {
  local each=$(($2 / 10)) hash began number fetches=()
  [[ -e $dir/page-$each ]] || random_file "page-$each" "$each"
  hash=$(hash_of "$dir/page-$each")
  # A command that closes its standard output before it has read all of its input is cut off by kubelet: hence sh's word.
  same "$(patience=300 k exec -i "pod-$1" -c main -- sh -c 'cat > /www/big; echo there' < "$dir/page-$each")" there
  forwarded "$1"
  same "$(curl -sS --max-time 20 "http://127.0.0.1:${at[forwarded]}/")" "hello from pod-$1"
  began=$(now)
  for number in {1..10}; do
    curl -sS --max-time 300 "http://127.0.0.1:${at[forwarded]}/big" | sha256sum > "$dir/fetched-$number" &
    fetches+=($!)
  done
  wait "${fetches[@]}"
  began=$(($(now) - began))
  for number in {1..10}; do same "$(cut -d' ' -f1 "$dir/fetched-$number")" "$hash"; done
  running forward || fail 'kubectl port-forward ended by itself'
  stop forward
  k exec "pod-$1" -c main -- rm /www/big
  echo "10 connections, $2 MB at $(($2 * 1000 / began)) MB/s"
}

# --- the apiserver as a proxy -------------------------------------------------------------------------------------

# The kubelet's own pods, so that it is seen which of two nodes with one address has answered.
verb_node_proxy() {
  local node=/api/v1/nodes/node-$1/proxy words
  same "$(k get --raw "$node/healthz")" ok
  same "$(k get --raw "$node/stats/summary" | grep -o '"nodeName": *"[^"]*"' | tr -d ' ')" "\"nodeName\":\"node-$1\""
  words=$(k get --raw "$node/pods" | grep -o '"name":"pod-[0-9]*"' | sort -u)
  same "$words" "\"name\":\"pod-$1\""
}
verb_pod_proxy() { same "$(k get --raw "/api/v1/namespaces/default/pods/pod-$1:8080/proxy/")" "hello from pod-$1"; }
verb_service_proxy() { same "$(k get --raw /api/v1/namespaces/default/services/page:http/proxy/)" "hello from pod-$1"; }

# --- what the apiserver asks a pod ----------------------------------------------------------------------------------

certificate_of_answer() {
  certificate answer kube /CN=answer serverAuth DNS:answer.default.svc
  k create secret tls answer --cert "$pki/answer.crt" --key "$pki/answer.key" > /dev/null
}

webhook_on() {
  k apply -f - > /dev/null << EOF
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: story}
webhooks:
- name: story.test.causeway
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 10
  clientConfig: {service: {name: answer, namespace: default, path: /admit}, caBundle: $(base64 -w 0 "$pki/kube.crt")}
  objectSelector: {matchLabels: {story: 'yes'}}
  rules: [{apiGroups: [''], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
EOF
}
config_map() {
  k create -f - << EOF
{"apiVersion":"v1","kind":"ConfigMap","metadata":{"generateName":"story-","labels":{"story":"yes","deny":"$1"}}}
EOF
}
denied() { [[ $(config_map yes 2>&1) == *"pod-$1 does not like it"* ]]; }

verb_webhook() {
  webhook_on
  # An apiserver hears of a new webhook a moment later.
  wait_for 20 denied "$1"
  has "$(config_map no)" created
  k delete validatingwebhookconfiguration story > /dev/null
}

verb_aggregated() {
  k apply -f - > /dev/null << EOF
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1.story.test}
spec:
  group: story.test
  version: v1
  groupPriorityMinimum: 1000
  versionPriority: 10
  service: {name: answer, namespace: default, port: 443}
  caBundle: $(base64 -w 0 "$pki/kube.crt")
EOF
  # Every apiserver says to all of them whether it reaches the pod; the one that does not is not asked now.
  kill -STOP "${pid[apiserver-plain]}"
  wait_for 30 recited "$1"
  kill -CONT "${pid[apiserver-plain]}"
  k delete apiservice v1.story.test > /dev/null
}
recited() { [[ $(k get --raw /apis/story.test/v1/poem) == "pod-$1: no way leads here but the mesh" ]]; }

# door_works OPTION...: whether meshctl finds kubelets of all nodes behind that door.
door_works() {
  local words
  words=$(ctl kube check --kubeconfig "$pki/plain.conf" -o json "$@") || fail "$words"
  has "$words" node-3
}

# --- how long it takes ----------------------------------------------------------------------------------------------

# exec_times POD COUNT NAME...: the median of `exec -- true` by each of these apiservers in ms, taken in turn, so that
# what else the machine does falls on all of them alike; NAME=MS for each.
exec_times() {
  local pod=$1 count=$2 name began
  shift 2
  for name in "$@"; do : > "$dir/times-$name"; done
  while ((count-- > 0)); do
    for name in "$@"; do
      began=${EPOCHREALTIME/./}
      kubectl --kubeconfig "$pki/$name.conf" exec "pod-$pod" -c main -- true
      echo $(((${EPOCHREALTIME/./} - began) / 100)) >> "$dir/times-$name"
    done
  done
  for name in "$@"; do
    sort -n "$dir/times-$name" | awk -v name="$name" '{ t[NR] = $1 } END { printf "%s=%.1f ", name, t[int((NR + 1) / 2)] / 10 }'
  done
}
