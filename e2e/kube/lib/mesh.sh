# Sourced by kube.sh: the mesh beside this Kubernetes: control and a shard where the apiservers are, an edge on each node.
# shellcheck shell=bash

# mesh N...: control, shard-1 with both egress doors, an edge on each of these nodes, and apiservers `uds` and `tcp` that
# go through the doors.
mesh() {
  local number
  certificate mesh kube /CN=mesh clientAuth
  kubeconfig mesh
  # All that control reads of this Kubernetes.
  kubectl create clusterrole mesh --verb=get,list,watch \
    --resource=nodes,pods,services,endpointslices.discovery.k8s.io > /dev/null
  kubectl create clusterrolebinding mesh --clusterrole=mesh --user=mesh > /dev/null
  authority egress
  certificate egress-server egress /CN=egress serverAuth "IP:$here"
  certificate egress-client egress /CN=kube-apiserver clientAuth
  port egress
  control '[kubernetes]' 'enabled = true' "kubeconfig = '$pki/mesh.conf'"
  # The last lines of the shard's configuration: the doors.
  tcp_doors=(
    '[doors.egress]'
    "socket = '$dir/egress.sock'"
    '[doors.egress.tcp]'
    "listen = '$here:${at[egress]}'"
    "cert = '$pki/egress-server.crt'"
    "key = '$pki/egress-server.key'"
    "client_ca = '$pki/egress.crt'"
    "clients = ['kube-apiserver']"
  )
  # Alone it has everything; beside others, next to nothing.
  shard 'weight = 1'
  for number in "$@"; do edge_on "$number"; done
  for number in "$@"; do host=10.200.$number.2 wait_for 20 edge_ready "node-$number"; done
  allow apiserver 'edge/*' '*'

  egress_selector uds "uds: {udsName: $dir/egress.sock}"
  egress_selector tcp "tcp:" "  url: https://$here:${at[egress]}" \
    "  tlsConfig: {caBundle: $pki/egress.crt, clientCert: $pki/egress-client.crt, clientKey: $pki/egress-client.key}"
}

# edge_on N: an edge on node-N, with the node's name; what kube-apiserver needs is allowed without a word.
edge_on() {
  local name=node-$1
  host=10.200.$1.2 edge_config "$name"
  ctl token create --edge --name "$name" 2>> "$dir/log/meshctl.log" |
    mesh-edge join --config "$dir/$name.toml" 2>> "$dir/log/edge-$1.log"
  start_edge_on "$1"
}
start_edge_on() { start_in "node-$1" "edge-$1" mesh-edge --config "$dir/node-$1.toml"; }

# more_shards: two of them without egress doors, to which all edges move: apiservers know the address of shard-1 alone,
# and every stream goes on from there.
more_shards() {
  local name
  for name in shard-2 shard-3; do another_shard "$name"; done
  wait_for 60 has_no_edge
}
# In place of the one in scripts/mesh.sh: shards that wait for their streams when they stop.
start_shard() { start "${1:-shard-1}" mesh-cloud --config "$dir/${1:-shard-1}.toml" --set drain_secs=60; }
# What is left are tunnels that wait for connections which kube-apiserver keeps for later.
has_no_edge() { (($(metric "${at[shard.admin]}" mesh_shard_tunnels) == $(metric "${at[shard.admin]}" mesh_shard_tunnels_leaving))); }
