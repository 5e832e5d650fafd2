#!/usr/bin/env bash
# roaming: addresses change under a running scp of 200 MB, and the NAT forgets: it goes on, over QUIC, within 3 s.
source "$(dirname "$0")/../lab.sh"

lab link rate=200mbit delay=10ms queue=2bdp

step 'a mesh in the cloud, an edge with sshd at the site'
control
shard
site_sshd
site_edge shop-1 ssh ssh "127.0.0.1:${at[sshd]}" -- '[carriers]' 'tcp = false'
allow group/admin 'edge/*' '*'
start_site_edge shop-1
wait_for 20 site_edge_ready shop-1
config=(-F "$dir/ssh_config")
if whole; then megabytes=200 ways=(up down); else megabytes=60 ways=(down); fi
random_file file $megabytes
hash=$(hash_of "$dir/file")
same "$(ssh "${config[@]}" shop-1 echo hello)" hello
ok

# scp_while WHICH CHANGE...: copies the file to the site (up) or from it (down), and does that in the middle.
scp_while() {
  local which=$1 from=$dir/file to=$dir/copy.$1 began
  shift
  [[ $which == up ]] && to=shop-1:$to || from=shop-1:$from
  rm -f "$dir/copy.$which" "$dir/copy.$which.done"
  start growing growing "$dir/copy.$which"
  began=$(now)
  start scp scp "${config[@]}" "$from" "$to"
  halfway() { (($(stat -c %s "$dir/copy.$which" 2> /dev/null || echo 0) > megabytes * 300000)); }
  wait_for 30 halfway
  "$@"
  wait "${pid[scp]}" || fail "scp broke: $(tail -n 3 "$dir/log/scp.log")"
  unset 'pid[scp]'
  touch "$dir/copy.$which.done"
  wait "${pid[growing]}"
  unset 'pid[growing]'
  same "$(hash_of "$dir/copy.$which")" "$hash"
  pause=$(cat "$dir/copy.$which.pause")
  below "$pause" 3000 'the pause in ms'
  figures="$((megabytes * 8000 / ($(now) - began))) Mbit/s, longest pause $pause ms"
}

n=10
for way in "${ways[@]}"; do
  step "the site has another address, and the old one is gone: scp $way"
  site_moves $((n += 1))
  wait_for 20 site_edge_ready shop-1
  scp_while "$way" site_moves $((n += 1))
  ok "$figures"

  step "the router has another address: scp $way"
  scp_while "$way" router_moves $((n += 1))
  ok "$figures"

  step "the NAT forgets: scp $way"
  nat symmetric
  scp_while "$way" nat_forgets
  ok "$figures"
done

step 'and it was one and the same tunnel all the time, over QUIC'
same "$(edge_metric 'mesh_edge_dials_total{outcome="welcome"}')" 1
over quic
told none 0 'shard-1 holds its tunnel' shop-1
ok "new sockets: $(edge_metric mesh_edge_rebinds_total); $sentence"
