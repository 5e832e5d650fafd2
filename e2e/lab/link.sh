#!/usr/bin/env bash
# link: the emulated Internet keeps its word: delay, rate, queue, loss, a black hole, and changes while it runs.
source "$(dirname "$0")/../lab.sh"

lab link

step 'a plain TCP service on the router, no mesh'
port plain
start plain ip netns exec "$router" "$(command -v mesh-loadtest)" serve --name router --tricks "$net.2:${at[plain]}"
wait_for 10 grep -q ready "$dir/log/plain.out"
ok "$(mesh-loadtest latency --connect "$net.2:${at[plain]}" --seconds 2)"

step 'without a bound it moves what two TUN devices take'
figures=$(mesh-loadtest pull --connect "$net.2:${at[plain]}" --bytes 300000000)
ok "$(awk -v mb="$(figure mb_s "$figures")" 'BEGIN { print mb * 8 }') Mbit/s"

step 'a delay of 25 ms each way is one of 50 ms there and back'
internet both delay=25ms
figures=$(mesh-loadtest latency --connect "$net.2:${at[plain]}" --seconds 5)
below 50 "$(figure p50_ms "$figures")" '50 ms'
below "$(figure p50_ms "$figures")" 55 'the median round trip in ms'
ok "$figures"

step 'a rate of 50 Mbit/s, and a queue of one bandwidth-delay product that fills'
internet both rate=50mbit queue=1bdp
internet_forget
figures=$(mesh-loadtest pull --connect "$net.2:${at[plain]}" --bytes 25000000)
below "$(figure mb_s "$figures")" 6.5 'MB/s'
ok "$(awk -v mb="$(figure mb_s "$figures")" 'BEGIN { print mb * 8 }') Mbit/s; $(internet_figures up)"

step 'one packet of twenty is lost, and larger ones than 1280 bytes vanish'
internet both clear loss=5%
internet_forget
mesh-loadtest pull --connect "$net.2:${at[plain]}" --bytes 10000000 > /dev/null
figures=$(internet_figures up)
lost=$(awk -v l="$(figure lost "$figures")" -v o="$(figure offered "$figures")" 'BEGIN { print 100 * l / o }')
below "$lost" 6 '% lost' && below 4 "$lost" '4 %'
internet both clear mtu=1280
internet_forget
refused timeout 2 mesh-loadtest pull --connect "$net.2:${at[plain]}" --bytes 100000 > /dev/null
vanished=$(figure too_big "$(internet_figures up)")
((vanished > 0)) || fail 'nothing vanished'
ok "$lost % lost; $vanished packets of a transfer vanished"
