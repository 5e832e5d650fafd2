#!/usr/bin/env bash
# loss: 5 % loss and 200 ms; ssh echoes keystrokes beside a download on the same tunnel, over QUIC and over TCP.
source "$(dirname "$0")/../lab.sh"

if whole; then seconds=40 counts=(1 20); else seconds=12 counts=(1); fi
lab link rate=20mbit delay=100ms queue=1bdp loss=5%

step 'a mesh in the cloud, an edge with sshd at the site'
control
door echo shop-1/echo
shard
site_sshd
site_tricks
site_edge shop-1 ssh ssh "127.0.0.1:${at[sshd]}" echo tcp "127.0.0.1:${at[tricks]}"
allow group/admin 'edge/*' '*'
allow door/echo service/echo
config=(-F "$dir/ssh_config")
internet both loss=0
start_site_edge shop-1
wait_for 30 site_edge_ready shop-1
same "$(ssh "${config[@]}" shop-1 echo hello)" hello
internet both loss=5%
ok

# keys: how long keystrokes take until they are on the screen of an ssh session, $seconds long.
keys() {
  mesh-loadtest keys --seconds "$seconds" --every 0.1 -- ssh -tt "${config[@]}" shop-1 'echo ready; exec cat'
}
# As echoes, on a path where that takes its time.
patiently_echoes() { timeout 5 mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 100; }
# downloads COUNT: so many downloads through the same tunnel, without end.
downloads() {
  local each
  for ((each = 0; each < $1; each++)); do
    start "bulk.$each" mesh-loadtest pull --connect "$host:${at[echo]}"
    wait_for 30 grep -q flowing "$dir/log/bulk.$each.out"
  done
}
no_downloads() {
  local each
  for each in "${!pid[@]}"; do
    [[ $each != bulk.* ]] || { crash "$each" && rm "$dir/log/$each.out"; }
  done
}

declare -A p50=() p99=()
for carrier in quic tcp; do
  if [[ $carrier == tcp ]]; then
    step 'the same over TCP: UDP is blocked'
    stop shop-1
    udp drop
    start_site_edge shop-1
    wait_for 30 over tcp
    wait_for 30 patiently_echoes
    ok
  fi
  over $carrier
  if whole; then
    step "keystrokes over $carrier, alone"
    alone=$(keys)
    ok "$alone"
  fi
  for count in "${counts[@]}"; do
    step "keystrokes over $carrier beside $count downloads"
    downloads "$count"
    internet_forget
    beside=$(keys)
    no_downloads
    p50[$carrier.$count]=$(figure p50_ms "$beside")
    p99[$carrier.$count]=$(figure p99_ms "$beside")
    [[ $carrier == tcp ]] || below "${p99[$carrier.$count]}" 1200 'p99 of a keystroke in ms'
    [[ $carrier == tcp ]] || told lossy-path 0 'of 100 packets' shop-1
    ok "$beside; up $(internet_figures up | grep -o 'queue_p50.*')"
  done
done

step 'over QUIC nothing waits for what another stream has lost'
# Alone, a keystroke takes 200 ms, and longer only if its own packet is lost.
below "${p50[quic.1]}" 300 'the median over QUIC in ms'
below "${p50[quic.1]}" "${p50[tcp.1]}" 'the median over QUIC in ms, which over TCP is the second,'
! whole || below "${p99[quic.1]}" "${p99[tcp.1]}" 'p99 over QUIC in ms, which over TCP is the second,'
ok "beside a download, p50 and p99: QUIC ${p50[quic.1]} and ${p99[quic.1]} ms, TCP ${p50[tcp.1]} and ${p99[tcp.1]} ms"
