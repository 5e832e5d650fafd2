#!/usr/bin/env bash
# mtu: packets grow as large as the path takes; a black hole for larger ones that appears in mid-transfer costs < 5 s.
source "$(dirname "$0")/../lab.sh"

lab link rate=50mbit delay=20ms queue=2bdp

step 'a mesh in the cloud, an edge at the site'
echo_site '[carriers]' 'tcp = false'
start_site_edge shop-1
wait_for 20 site_edge_ready shop-1
ok

step 'packets grow from 1200 bytes to what an Ethernet path takes'
mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 2000000 > /dev/null
grown() { (($(edge_metric mesh_edge_path_mtu_bytes) > 1400)); }
wait_for 20 grown
ok "$(edge_metric mesh_edge_path_mtu_bytes) bytes of UDP payload"

# narrow WAY COMMAND...: a transfer in which the path gets narrow: the longest time that nothing moved.
narrow() {
  local way=$1 figures
  shift
  start bulk mesh-loadtest "$@" --connect "$host:${at[echo]}" --bytes 40000000
  moving() { (($(internet_figures up | grep -o 'sent_bytes=[0-9]*' | cut -d= -f2) > 10000000)); }
  internet_forget
  wait_for 20 moving
  internet "$way" mtu=1280
  wait "${pid[bulk]}" || fail "the transfer broke: $(cat "$dir/log/bulk.log")"
  unset 'pid[bulk]'
  figures=$(tail -n 1 "$dir/log/bulk.out")
  same "$(figure bytes "$figures")" 40000000
  pause=$(figure pause_ms "$figures")
  words="longest pause $pause ms, $(figure mb_s "$figures") MB/s, $(internet_figures both | grep -o 'too_big=[0-9]*' | tr '\n' ' ')"
}
# wide: as it was at first.
wide() {
  internet both mtu=none
  stop shop-1
  start_site_edge shop-1
  wait_for 20 site_edge_ready shop-1
  mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 2000000 > /dev/null
}

for way in up down; do
  step "a black hole for packets above 1280 bytes, $way, while 40 MB go there and back"
  narrow "$way" echo --say echo
  below "$pause" 5000 'the pause in ms'
  [[ $way == down ]] || told narrow-path 0 'takes no packets above' shop-1
  ok "$words"
  wide
done

step 'the same in both directions, while 40 MB come from the site'
narrow both pull
below "$pause" 5000 'the pause in ms'
ok "$words"
wide

# What tells of losses is lost as well, and quinn acknowledges nothing while its window is full: that it heals, and loses
# nothing, is all that can be asked.
step 'the same in both directions, while 40 MB go there and back'
narrow both echo --say echo
ok "$words"

step 'a path that was narrow from the start'
internet both mtu=1280
stop shop-1
start_site_edge shop-1
wait_for 10 echoes
figures=$(mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 4000000)
told narrow-path 0 'takes no packets above 12' shop-1
ok "$(figure mb_s "$figures") MB/s, $(edge_metric mesh_edge_path_mtu_bytes) bytes of UDP payload"
