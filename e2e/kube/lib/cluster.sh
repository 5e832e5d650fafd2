# Sourced by kube.sh: the control plane of a real Kubernetes, and the network that keeps it away from its nodes.
# shellcheck shell=bash
#
#   here (network namespace of the story): etcd, kube-apiserver, controllers, scheduler, and the mesh's control and shards
#     10.200.0.1 ── 10.200.N.0/30 ── node-N (a namespace of its own): containerd, kubelet on an address to which nothing
#                                     here has a route, and pods in 10.244.N.0/24
#   direct (a namespace of its own): a second kube-apiserver, which does have a route to node-1 and its pods, and shows
#     what everything costs without a mesh

here=10.200.0.1
direct=10.201.0.1
pki=$dir/pki
export KUBECACHEDIR=$dir/kubectl

# within PLACE COMMAND...: runs it in the namespaces of a node or of `direct`. start_in PLACE NAME COMMAND...: starts it
# there; nsenter becomes the command, so the pid is the command's.
within() {
  local place=$1
  shift
  nsenter --target "${pid[$place]}" --net --mount "$@"
}
start_in() {
  local place=$1 name=$2
  shift 2
  start "$name" nsenter --target "${pid[$place]}" --net --mount "$@"
}

# place NAME: namespaces that live as long as the process that holds them.
place() {
  start "$1" unshare --net --mount sleep infinity
  wait_for 5 apart "${pid[$1]}"
  within "$1" ip link set lo up
}
apart() { [[ $(cat "/proc/$1/comm") == sleep ]]; }

# wire A ADDRESS B ADDRESS: a cable between two places (`-` is here), named after the other end.
wire() {
  local a=$1 b=$3 at_a=() at_b=()
  if [[ $a != - ]]; then at_a=(netns "${pid[$a]}"); fi
  if [[ $b != - ]]; then at_b=(netns "${pid[$b]}"); fi
  ip link add "to-${b/#-/here}" "${at_a[@]}" type veth peer name "to-${a/#-/here}" "${at_b[@]}"
  plug "$a" "to-${b/#-/here}" "$2"
  plug "$b" "to-${a/#-/here}" "$4"
}
plug() {
  local run=()
  if [[ $1 != - ]]; then run=(within "$1"); fi
  "${run[@]}" ip address add "$3" dev "$2"
  "${run[@]}" ip link set "$2" up
}

# --- who is who ---------------------------------------------------------------------------------------------------

# authority NAME: a certificate authority. certificate NAME AUTHORITY SUBJECT USAGE [NAMES]: issued by it.
authority() { issue "$1" "/CN=$1" -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign; }
certificate() {
  local names=()
  if [[ -n ${5:-} ]]; then names=(-addext "subjectAltName=$5"); fi
  issue "$1" "$3" -CA "$pki/$2.crt" -CAkey "$pki/$2.key" -addext basicConstraints=critical,CA:FALSE \
    -addext "extendedKeyUsage=$4" "${names[@]}"
}
issue() {
  local name=$1 subject=$2
  shift 2
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3 -subj "$subject" \
    -config "$pki/openssl.conf" -keyout "$pki/$name.key" -out "$pki/$name.crt" "$@" 2>> "$dir/openssl.log"
}

# kubeconfig NAME [SERVER]: for the certificate of that name.
kubeconfig() {
  kubectl config --kubeconfig "$pki/$1.conf" set-cluster it --server "https://${2:-$here:6443}" \
    --certificate-authority "$pki/kube.crt"
  kubectl config --kubeconfig "$pki/$1.conf" set-credentials me --client-certificate "$pki/$1.crt" \
    --client-key "$pki/$1.key"
  kubectl config --kubeconfig "$pki/$1.conf" set-context it --cluster it --user me
  kubectl config --kubeconfig "$pki/$1.conf" use-context it
} > /dev/null

credentials() {
  local name
  mkdir "$pki"
  printf '[req]\ndistinguished_name = dn\n[dn]\n' > "$pki/openssl.conf"
  for name in kube front; do authority "$name"; done
  certificate apiserver kube /CN=kube-apiserver serverAuth \
    "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1,IP:10.200.4.2,IP:$here,IP:$direct"
  certificate to-kubelet kube '/O=system:masters/CN=kube-apiserver-kubelet-client' clientAuth
  certificate admin kube '/O=system:masters/CN=admin' clientAuth
  certificate controllers kube /CN=system:kube-controller-manager clientAuth
  certificate scheduler kube /CN=system:kube-scheduler clientAuth
  certificate proxy kube /CN=system:kube-proxy clientAuth
  certificate front-client front /CN=front-proxy-client clientAuth
  openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$pki/accounts.key" 2> /dev/null ||
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$pki/accounts.key" 2> /dev/null
  openssl pkey -in "$pki/accounts.key" -pubout -out "$pki/accounts.pub"
  for name in admin controllers scheduler proxy; do kubeconfig "$name"; done
  export KUBECONFIG=$pki/admin.conf
}

# --- the control plane --------------------------------------------------------------------------------------------

store() {
  start etcd etcd --name it --data-dir "$dir/etcd" --unsafe-no-fsync --logger zap --log-level warn \
    --listen-client-urls "http://$here:2379" --advertise-client-urls "http://$here:2379" \
    --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
    --initial-cluster it=http://127.0.0.1:2380
  wait_for 20 curl -sf "http://$here:2379/health"
}

# egress_selector NAME LINE...: how an apiserver reaches the cluster: the lines under `transport`.
egress_selector() {
  local name=$1
  shift
  {
    printf '%s\n' 'apiVersion: apiserver.k8s.io/v1beta1' 'kind: EgressSelectorConfiguration' 'egressSelections:' \
      '- name: cluster' '  connection:' '    proxyProtocol: HTTPConnect' '    transport:'
    printf '      %s\n' "$@"
  } > "$dir/egress-$name.yaml"
}

# apiserver NAME ADDRESS PORT [FLAG...]: one more kube-apiserver on the same store, with the egress_selector of that
# name if there is one. `direct` runs in its own place, `cloud` on the node there. From then on, `use NAME`.
apiserver() {
  local name=$1 address=$2 door=$3 egress=() run=(start "apiserver-$1") ends=none
  shift 3
  if [[ -e $dir/egress-$name.yaml ]]; then egress=(--egress-selector-config-file "$dir/egress-$name.yaml"); fi
  case $name in
    direct) run=(start_in direct apiserver-direct) ;;
    cloud) run=(start_in node-4 apiserver-cloud) ;;
  esac
  # Only the one that nodes know is behind the Service `kubernetes`.
  if [[ $address:$door == "$here:6443" ]]; then ends=lease; fi
  "${run[@]}" kube-apiserver --etcd-servers "http://$here:2379" --advertise-address "$address" --secure-port "$door" \
    --service-cluster-ip-range 10.96.0.0/16 --endpoint-reconciler-type "$ends" --allow-privileged \
    --client-ca-file "$pki/kube.crt" --tls-cert-file "$pki/apiserver.crt" --tls-private-key-file "$pki/apiserver.key" \
    --kubelet-certificate-authority "$pki/kube.crt" --kubelet-client-certificate "$pki/to-kubelet.crt" \
    --kubelet-client-key "$pki/to-kubelet.key" \
    --service-account-issuer https://kubernetes.default.svc --service-account-key-file "$pki/accounts.pub" \
    --service-account-signing-key-file "$pki/accounts.key" --authorization-mode Node,RBAC \
    --enable-admission-plugins NodeRestriction --requestheader-client-ca-file "$pki/front.crt" \
    --requestheader-allowed-names front-proxy-client --requestheader-username-headers X-Remote-User \
    --requestheader-group-headers X-Remote-Group --requestheader-extra-headers-prefix X-Remote-Extra- \
    --proxy-client-cert-file "$pki/front-client.crt" --proxy-client-key-file "$pki/front-client.key" \
    "${egress[@]}" "$@"
  cp "$pki/admin.key" "$pki/$name.key"
  cp "$pki/admin.crt" "$pki/$name.crt"
  kubeconfig "$name" "$address:$door"
  wait_for 180 kubectl --kubeconfig "$pki/$name.conf" get --raw /readyz
}

# use NAME: kubectl talks to the apiserver of that name from now on.
use() { export KUBECONFIG=$pki/$1.conf; }

controllers() {
  start controllers kube-controller-manager --kubeconfig "$pki/controllers.conf" --leader-elect=false \
    --authentication-kubeconfig "$pki/controllers.conf" --authorization-kubeconfig "$pki/controllers.conf" \
    --service-account-private-key-file "$pki/accounts.key" --root-ca-file "$pki/kube.crt" \
    --use-service-account-credentials --cluster-signing-cert-file "$pki/kube.crt" \
    --cluster-signing-key-file "$pki/kube.key" "$@"
  start scheduler kube-scheduler --kubeconfig "$pki/scheduler.conf" --leader-elect=false \
    --authentication-kubeconfig "$pki/scheduler.conf" --authorization-kubeconfig "$pki/scheduler.conf"
  wait_for 120 kubectl get serviceaccount default
}
