#!/usr/bin/env bash
# ipv6: the same mesh with nothing but IPv6, from control to the services behind the edge.
host='[::1]'
source "$(dirname "$0")/../lib.sh"

control
door echo shop-1/echo
shard
port web tls tcp
start services mesh-loadtest serve --name shop-1 --http "$host:${at[web]}" --https "$host:${at[tls]}" \
  --dns "secure.shop-1.$domain" --ca-out "$dir/ca.pem" --echo "$host:${at[tcp]}"
wait_for 10 grep -q ready "$dir/log/services.out"
edge shop-1 web http "$host:${at[web]}" secure https "$host:${at[tls]}" echo tcp "$host:${at[tcp]}" -- 'allow = ["[::1]:*"]'

step 'an edge enrols and dials out over IPv6'
edges_ready shop-1
seen() { [[ $(ctl edge show shop-1) == *'::1'* ]]; }
wait_for 10 seen
ok "$(ctl edge show shop-1 | grep '^from')"

allow door/http service/web
allow door/https service/secure
allow door/echo service/echo
allow user/admin 'edge/*' '*'

step 'a page by Host, and one by SNI'
has "$(get "http://web.shop-1.$domain/" --connect "$host:${at[shard.http]}")" 'hello from shop-1'
has "$(get "https://secure.shop-1.$domain/" --connect "$host:${at[shard.https]}" --cacert "$dir/ca.pem")" 'hello from shop-1'
ok

step '20 MB through a TCP door, compared by hash'
ok "$(mesh-loadtest echo --connect "$host:${at[echo]}" --bytes 20000000)"

step 'a target by its IPv6 address, with meshctl proxy'
same "$(printf 'there and back' | ctl proxy "shop-1/[::1]:${at[tcp]}")" 'there and back'
ok

step 'ping'
answer=$(ctl ping -c 1 shop-1)
ok "${answer%%$'\n'*}"
