# Sourced by kube.sh: the mesh as deploy/manifests bring it up, inside of this Kubernetes, and the controller-manager's own
# HorizontalPodAutoscaler that scales its shards.
# shellcheck shell=bash

space=causeway-system
kc() { timeout "${patience:-60}" kubectl --namespace "$space" "$@"; }

# cloud: node-4, which everybody reaches, and its pods as well.
cloud() {
  local program files=()
  # Without what only a debugger reads, and without what these pods do not run.
  for program in mesh-control mesh-cloud mesh-edge meshctl; do
    strip -o "$dir/$program" "$(command -v "$program")"
    files+=("$dir/$program")
  done
  image causeway '["meshctl","--help"]' "${files[@]}"
  node 4 10.200.4.2
  ip route add 10.244.4.0/24 via 10.200.4.2
  echo 1 > /proc/sys/net/ipv4/ip_forward
  containers 3 images import "$dir/images/causeway.tar" > /dev/null
  nodes_ready 4
  kubectl label node node-4 causeway.dev/cloud= > /dev/null
  kubectl label nodes node-3 node-4 causeway.dev/story=edge > /dev/null
}

# manifests: those of deploy/, with what docs/kubernetes.md says that is to be edited, and with what this cluster lacks:
# names (no DNS), volumes (no storage class), more than one node for shards (their pods have addresses that edges reach),
# and time.
manifests() {
  local place=$dir/cluster control=10.96.7.43 files
  cp -r ../deploy/manifests "$place"
  files=$(cd "$place" && printf '%s, ' [a-z]*.yaml)
  sed -i "s/^    public = .*/    public = [\"10.200.4.2:30743\"]/" "$place/control.yaml"
  cat > "$place/kustomization.yaml" << EOF
resources: [$files]
images: [{name: causeway, newName: local/causeway, newTag: '1'}]
patches:
- target: {kind: Service, name: causeway-control\$}
  patch: '- {op: add, path: /spec/clusterIP, value: $control}'
- target: {kind: StatefulSet}
  patch: |
    - {op: remove, path: /spec/volumeClaimTemplates}
    - {op: add, path: /spec/template/spec/volumes/-, value: {name: data, hostPath: {path: /var/lib/causeway-control, type: Directory}}}
- target: {kind: Deployment}
  patch: |
    - {op: add, path: /spec/template/spec/hostAliases, value: [{ip: $control, hostnames: [causeway-control.$space.svc]}]}
    - {op: remove, path: /spec/template/spec/containers/0/ports/0/hostPort}
    - {op: remove, path: /spec/template/spec/containers/0/ports/1/hostPort}
    - {op: replace, path: /spec/template/spec/containers/0/env/2/valueFrom/fieldRef/fieldPath, value: status.podIP}
    - {op: replace, path: /spec/template/spec/containers/0/resources/requests/cpu, value: 50m}
    - {op: replace, path: /spec/minReadySeconds, value: 2}
- target: {kind: DaemonSet}
  patch: '- {op: add, path: /spec/template/spec/nodeSelector/causeway.dev~1story, value: edge}'
- target: {kind: HorizontalPodAutoscaler}
  patch: |
    - {op: replace, path: /spec/minReplicas, value: 1}
    - {op: replace, path: /spec/maxReplicas, value: 3}
    - {op: replace, path: /spec/metrics/0/pods/target/averageValue, value: '20'}
    - op: replace
      path: /spec/behavior
      value:
        scaleUp: {stabilizationWindowSeconds: 0, policies: [{type: Pods, value: 2, periodSeconds: 15}]}
        scaleDown: {stabilizationWindowSeconds: 5, policies: [{type: Pods, value: 1, periodSeconds: 15}]}
EOF
}
# cluster_mesh: as docs/kubernetes.md has it, step by step.
cluster_mesh() {
  within node-4 install -d -o 65532 -m 700 /var/lib/causeway-control
  kubectl create namespace "$space" > /dev/null
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3650 -subj '/CN=mesh CA' \
    -addext keyUsage=critical,keyCertSign,cRLSign -keyout "$dir/ca.key" -out "$dir/ca.crt" 2>> "$dir/openssl.log"
  kc create secret generic causeway-ca --from-file=tls.crt="$dir/ca.crt" --from-file=tls.key="$dir/ca.key" \
    --from-literal=hash="sha256:$(openssl x509 -in "$dir/ca.crt" -pubkey -noout | openssl pkey -pubin -outform der | sha256sum | cut -d' ' -f1)" > /dev/null
  manifests
  kubectl apply -k "$dir/cluster" > "$dir/log/apply.out"
  patience=250 kc rollout status --timeout=240s statefulset/causeway-control deployment/causeway-shard > /dev/null || {
    pods_say
    fail 'control and shards do not come up'
  }
  mesh_in_cluster login --file /var/lib/causeway/control/admin.join > /dev/null
  mesh_in_cluster policy allow --from apiserver --to 'edge/*' --ports '*' > /dev/null
}
# What the pods of the mesh said last, as their nodes have it: an apiserver may not reach them.
pods_say() {
  kc get pods -o wide >&2
  kc get events | tail -n 20 >&2
  tail -n 8 "$dir"/node-[34]/log/pods/"$space"_*/*/*.log >&2
}
mesh_in_cluster() { kc exec -i causeway-control-0 -- meshctl "$@"; }

# cluster_edges: the DaemonSet, once there is a line to join with.
cluster_edges() {
  mesh_in_cluster token create --edge --uses 10 --ttl 1d 2>> "$dir/log/meshctl.log" > "$dir/edges.line"
  kc create secret generic causeway-edge-join --from-file=line="$dir/edges.line" > /dev/null
  kc rollout restart daemonset/causeway-edge > /dev/null
  patience=250 kc rollout status --timeout=240s daemonset/causeway-edge > /dev/null || {
    pods_say
    fail 'edges do not come up'
  }
}

replicas() { kc get deployment causeway-shard -o 'jsonpath={.status.readyReplicas}/{.status.replicas}'; }
fewer_than() { (($(kc get deployment causeway-shard -o 'jsonpath={.status.replicas}') < $1)); }
are() { [[ $(replicas) == "$1/$1" ]]; }
# Tunnels of all shards, as the HPA is told.
tunnels() {
  kubectl get --raw "/apis/custom.metrics.k8s.io/v1beta2/namespaces/$space/pods/*/mesh_shard_tunnels" |
    grep -o '"value": *"[0-9]*"' | tr -dc '0-9\n' | sort -n | paste -sd+
}
tunnels_are() { (($(tunnels) == $1)); }
scaled_to() {
  wait_for "$2" are "$1" || {
    kc describe hpa >&2
    pods_say
    fail "the HPA does not scale to $1"
  }
}

# many_edges COUNT: simulated, outside of the cluster.
many_edges() {
  mesh_in_cluster token create --edge --uses "$1" 2>> "$dir/log/meshctl.log" > "$dir/many.line"
  # They go when their standard input ends, and they leave as edges do that are stopped.
  start many-in sleep infinity
  mesh-loadtest edges --count "$1" --join "$dir/many.line" --follow < <(tail -f /dev/null --pid="${pid[many-in]}") \
    > "$dir/log/many.out" 2> "$dir/log/many.log" &
  pid[many]=$!
  wait_for 60 grep -q '^connected' "$dir/log/many.out"
}
# moves: how many edges had another tunnel, and how often.
moves() { grep '^up=' "$dir/log/many.out" | sort | uniq -c | awk '{ print $1 }' | sort -n | uniq -c | awk '{ printf "%s%d moved %d times", (NR > 1 ? ", " : ""), $1, $2 }'; }

# scaling: from the manifests to three shards and back.
scaling() {
  local name began took
  step 'the other mesh ends; a node in the cloud'
  # Those that go by it, or know nothing of this one, would say that the metrics API cannot be reached.
  for name in apiserver-uds apiserver-tcp apiserver-direct; do crash "$name"; done
  for name in edge-1 edge-2 edge-3 shard-3 shard-2 shard-1 control; do stop "$name"; done
  use plain
  cloud
  ok

  step 'the plain manifests: control and a shard, in pods, by the tokens of their accounts'
  cluster_mesh
  ok "$(replicas) shards ready"

  step 'edges by the DaemonSet'
  cluster_edges
  wait_for 30 tunnels_are 2
  ok "$(mesh_in_cluster edge ls | awk 'NR > 1 { print $1, $2 }' | paste -sd,)"

  step 'an apiserver in the cloud goes through the Service of the egress door'
  egress_selector cloud tcp: \
    "  url: https://$(kc get service causeway-egress -o 'jsonpath={.spec.clusterIP}'):8131" \
    "  tlsConfig: {caBundle: $dir/ca.crt, tlsServerName: causeway-egress," \
    "    clientCert: $pki/to-kubelet.crt, clientKey: $pki/to-kubelet.key}"
  apiserver cloud 10.200.4.2 6446
  use cloud
  wait_for 20 works 3
  verb_exec 3
  verb_node_proxy 3
  ok

  step 'sixty simulated edges come: the HPA makes three shards of one'
  began=$(now)
  many_edges 60
  scaled_to 3 120
  took=$(since "$began")
  wait_for 60 tunnels_are 62
  # A ring for each shard that comes: whoever the second one takes, the third may take from it.
  words=$(moves)
  ok "after $took; tunnels $(tunnels); of the edges $words"

  step 'they go, while exec, logs -f and port-forward run: one shard is left'
  going 3
  began=$(now)
  stop many-in
  wait_for 120 fewer_than 3
  gone_on 3
  scaled_to 1 240
  ok "after $(since "$began")"
  verb_exec 3
}
