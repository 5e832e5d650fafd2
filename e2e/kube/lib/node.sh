# Sourced by kube.sh: nodes (containerd, kubelet, kube-proxy) in namespaces of their own, and images made here.
# shellcheck shell=bash

# --- images -------------------------------------------------------------------------------------------------------

# image NAME COMMAND FILE...: an image with busybox and these files of ours in /bin, with the libraries that they are
# linked to. COMMAND is JSON. It is called local/NAME:1, and every node gets it when it starts.
image() {
  local name=$1 command=$2 root=$dir/images/$1 file library applet
  shift 2
  mkdir -p "$root/files/bin" "$root/files/etc" "$root/files/tmp" "$root/files/www"
  echo 'hosts: files dns' > "$root/files/etc/nsswitch.conf"
  chmod 1777 "$root/files/tmp"
  cp "$(command -v busybox)" "$root/files/bin/busybox"
  while read -r applet; do ln -sf busybox "$root/files/bin/$applet"; done < <(busybox --list | grep -vx busybox)
  for file in "$@"; do
    install -m 755 "$file" "$root/files/bin/"
    # ldd fails for a static program, which needs nothing.
    while read -r library; do
      mkdir -p "$root/files${library%/*}"
      cp -Ln "$library" "$root/files$library"
    done < <(ldd "$file" 2> /dev/null | grep -o '/[^ ]*' || true)
  done
  tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$root/files" -cf "$root/layer.tar" .
  printf '{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin"],"Cmd":%s},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
    "$command" "$(hash_of "$root/layer.tar")" > "$root/config.json"
  printf '[{"Config":"config.json","RepoTags":["local/%s:1"],"Layers":["layer.tar"]}]' "$name" > "$root/manifest.json"
  tar -C "$root" -cf "$dir/images/$name.tar" manifest.json config.json layer.tar
  rm -rf "$root"
}

# --- cgroups ------------------------------------------------------------------------------------------------------

# A group for each node, in every hierarchy; CAUSEWAY_CGROUP names them, and kube.sh removes them at the very end.
cgroup() {
  local name=$CAUSEWAY_CGROUP-$1 hierarchy file
  if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
    sed 's/[a-z_]*/+&/g' /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control || true
    mkdir "/sys/fs/cgroup/$name"
    return
  fi
  for hierarchy in /sys/fs/cgroup/*/; do
    mkdir -p "$hierarchy$name"
  done
  # A new group of the first version has no processors and no memory until it is told which.
  for file in cpuset.cpus cpuset.mems; do
    cat "/sys/fs/cgroup/cpuset/$file" > "/sys/fs/cgroup/cpuset/$name/$file"
  done
}

# --- nodes --------------------------------------------------------------------------------------------------------

containerd_config() {
  cat << EOF
version = 2
root = "$1/containerd"
state = "/run/containerd/state"
[grpc]
  address = "$1/containerd.sock"
[ttrpc]
  address = "$1/containerd.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "$1/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "local/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$cni"
    conf_dir = "$1/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
EOF
}

kubelet_config() {
  cat << EOF
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $2
healthzBindAddress: 127.0.0.1
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $pki/kube.crt}}
authorization: {mode: Webhook}
tlsCertFile: $pki/kubelet-$3.crt
tlsPrivateKeyFile: $pki/kubelet-$3.key
containerRuntimeEndpoint: unix://$1/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /$CAUSEWAY_CGROUP-$3
failCgroupV1: false
failSwapOn: false
containerLogMaxSize: 500Mi
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
resolvConf: $1/resolv.conf
nodeStatusUpdateFrequency: 5s
nodeStatusReportFrequency: 5s
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 50Mi, nodefs.available: 100Mi, imagefs.available: 100Mi}
EOF
}

# node N ADDRESS: node-N, whose kubelet listens on that address and nowhere else. Returns when it is started; ready by
# node_ready.
node() {
  local number=$1 address=$2 name=node-$1 home=$dir/node-$1 folder
  mkdir -p "$home/cni" "$home/lib/kubelet" "$home/log" "$home/run"
  place "$name"
  wire - "10.200.$number.1/30" "$name" "10.200.$number.2/30"
  within "$name" ip address add "$address/32" dev to-here
  within "$name" ip route add default via "10.200.$number.1"
  within "$name" sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'
  # What kubelet, containerd and CNI keep in fixed places of a machine is this node's own.
  for folder in lib log; do within "$name" mount --bind "$home/$folder" "/var/$folder"; done
  within "$name" mount --bind "$home/run" /run
  echo 'nameserver 10.96.0.10' > "$home/resolv.conf"
  printf '{"cniVersion":"0.4.0","name":"pods","plugins":[{"type":"ptp","ipMasq":true,"ipam":{"type":"host-local","subnet":"10.244.%s.0/24","routes":[{"dst":"0.0.0.0/0"}],"dataDir":"%s/addresses"}}]}' \
    "$number" "$home" > "$home/cni/pods.conflist"
  cgroup "$name"

  containerd_config "$home" > "$home/containerd.toml"
  start_in "$name" "containerd-$number" containerd --config "$home/containerd.toml"
  certificate "kubelet-$name" kube "/O=system:nodes/CN=system:node:$name" serverAuth "DNS:$name,IP:$address"
  certificate "$name" kube "/O=system:nodes/CN=system:node:$name" clientAuth
  kubeconfig "$name"
  kubelet_config "$home" "$address" "$name" > "$home/kubelet.yaml"
  # The node's range of pods is given to it here, so that CNI can know it from the start.
  printf '{"apiVersion":"v1","kind":"Node","metadata":{"name":"%s"},"spec":{"podCIDR":"10.244.%s.0/24","podCIDRs":["10.244.%s.0/24"]}}' \
    "$name" "$number" "$number" | kubectl apply -f - > /dev/null

  wait_for 30 containers "$number" version
  for folder in "$dir"/images/*.tar; do containers "$number" images import "$folder" > /dev/null; done
  start_in "$name" "kubelet-$number" kubelet --config "$home/kubelet.yaml" --kubeconfig "$pki/$name.conf" \
    --hostname-override "$name" --node-ip "$address" --cert-dir "$home/certs"
  start_in "$name" "proxy-$number" kube-proxy --kubeconfig "$pki/proxy.conf" --hostname-override "$name" \
    --proxy-mode iptables --conntrack-max-per-core 0 --conntrack-tcp-timeout-established 0s \
    --conntrack-tcp-timeout-close-wait 0s
}
containers() {
  local number=$1
  shift
  within "node-$number" ctr --address "$dir/node-$number/containerd.sock" --namespace k8s.io "$@"
}
nodes_ready() {
  local number
  for number in "$@"; do kubectl wait --for=condition=Ready "node/node-$number" --timeout=240s > /dev/null; done
}
