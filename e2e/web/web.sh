#!/usr/bin/env bash
# web: nginx behind an edge, reached with curl through the HTTP, HTTPS and proxy doors.
source "$(dirname "$0")/../lib.sh"

port nginx nginx.tls nginx.visitors
mkdir -p "$dir/www/up" "$dir/nginx"
chmod 777 "$dir/www/up" "$dir/nginx"
echo 'hello from nginx' > "$dir/www/index.html"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/CN=web.shop-1.$domain" \
  -addext "subjectAltName=DNS:secure.shop-1.$domain,DNS:shop-1.$domain" \
  -keyout "$dir/nginx/key.pem" -out "$dir/nginx/cert.pem" 2> /dev/null
cat > "$dir/nginx.conf" << EOF
daemon off;
worker_processes 1;
pid $dir/nginx/pid;
error_log $dir/log/nginx.log;
$([[ $(id -u) != 0 ]] || echo 'user www-data;')
events { worker_connections 4096; }
http {
  access_log off;
  client_max_body_size 2g;
  client_body_temp_path $dir/nginx/body;
  proxy_temp_path $dir/nginx/proxy;
  fastcgi_temp_path $dir/nginx/fastcgi;
  uwsgi_temp_path $dir/nginx/uwsgi;
  scgi_temp_path $dir/nginx/scgi;
  server {
    listen 127.0.0.1:${at[nginx.visitors]} proxy_protocol;
    location / { return 200 'a visitor from \$proxy_protocol_addr'; }
  }
  server {
    listen 127.0.0.1:${at[nginx]};
    listen 127.0.0.1:${at[nginx.tls]} ssl;
    ssl_certificate $dir/nginx/cert.pem;
    ssl_certificate_key $dir/nginx/key.pem;
    root $dir/www;
    location /up/ { dav_methods PUT DELETE; client_body_in_file_only off; }
    location /whoami { return 200 "\$http_x_forwarded_for|\$http_host|\$http_x_forwarded_proto\n"; }
  }
}
EOF
start nginx nginx -c "$dir/nginx.conf"
wait_for 10 listening "${at[nginx]}"
services other

control
door visitors shop-1/visitors
tcp_doors+=('proxy_protocol = true')
shard "names = ['localhost']"
edge shop-1 web http "127.0.0.1:${at[nginx]}" http http "127.0.0.1:${at[nginx]}" \
  secure https "127.0.0.1:${at[nginx.tls]}" https https "127.0.0.1:${at[nginx.tls]}" \
  app http "127.0.0.1:${at[other.http]}" visitors tcp "127.0.0.1:${at[nginx.visitors]}"
edges_ready shop-1
web=web.shop-1.$domain
door=http://$web:${at[shard.http]}
# curl that finds the doors under the names that DNS would have.
c() {
  curl -sS --max-time 60 --resolve "*:${at[shard.http]}:127.0.0.1" \
    --resolve "*:${at[shard.https]}:127.0.0.1" --cacert "$dir/nginx/cert.pem" "$@"
}

step 'a service without a rule: 403, and the text names the rule that is missing'
answer=$(c -w '%{http_code}' "$door/")
has "$answer" 'meshctl policy allow --from door/http --to service/web'
has "$answer" 403
ok
allow door/http 'service/web,service/http,service/app'
allow door/https 'service/secure,service/https'

step 'a page by Host'
same "$(c "$door/")" 'hello from nginx'
same "$(c "http://shop-1.$domain:${at[shard.http]}/")" 'hello from nginx'
ok "$web and shop-1.$domain"

step 'ten requests on one connection'
urls=()
for _ in {1..10}; do urls+=("$door/"); done
same "$(c -w '%{num_connects}\n' -o /dev/null "${urls[@]}" 2> /dev/null | awk '/^[01]$/ { n += $1 } END { print n }')" 1
ok 'one connect'

random_file www/big 1000
hash=$(hash_of "$dir/www/big")

step 'download of 1 GB'
began=$(now)
same "$(c "$door/big" | sha256sum | cut -d' ' -f1)" "$hash"
took=$(($(now) - began))
ok "$((1000000 / took)) MB/s, equal hashes"

step 'a part of a file (Range)'
same "$(c -r 1000-1999 "$door/big" | sha256sum)" "$(dd if="$dir/www/big" bs=1000 skip=1 count=1 status=none | sha256sum)"
ok

step 'upload of 100 MB with Content-Length, and chunked'
head -c 100000000 "$dir/www/big" > "$dir/up"
c -T "$dir/up" "$door/up/plain"
c -T - "$door/up/chunked" < "$dir/up"
same "$(hash_of "$dir/www/up/plain")" "$(hash_of "$dir/up")"
same "$(hash_of "$dir/www/up/chunked")" "$(hash_of "$dir/up")"
rm "$dir"/www/up/*
ok 'equal hashes'

step 'HTTP/2 without TLS'
same "$(c --http2-prior-knowledge -w '%{http_version}' "$door/")" "hello from nginx
2"
ok

step 'the service sees the host and who asked'
same "$(c "$door/whoami")" "127.0.0.1|$web:${at[shard.http]}|http"
ok

step 'an upgrade (WebSocket) carries bytes both ways'
# After 101 the little service echoes. Bytes that follow at once must not be lost either.
exec 4<> "/dev/tcp/127.0.0.1/${at[shard.http]}"
printf 'GET /ws HTTP/1.1\r\nHost: app.shop-1.%s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n' "$domain" >&4
printf 'Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n' >&4
IFS= read -r -t 5 line <&4
has "$line" '101 Switching Protocols'
while IFS= read -r -t 5 line <&4 && [[ $line != $'\r' ]]; do :; done
echo 'over the upgraded connection' >&4
IFS= read -r -t 5 line <&4
same "$line" 'over the upgraded connection'
exec 4>&-
ok

step 'HTTPS by SNI, certificate checked end to end'
secure=secure.shop-1.$domain
same "$(c "https://$secure:${at[shard.https]}/")" 'hello from nginx'
same "$(c "https://shop-1.$domain:${at[shard.https]}/")" 'hello from nginx'
served=$(openssl s_client -connect "127.0.0.1:${at[shard.https]}" -servername "$secure" < /dev/null 2> /dev/null |
  openssl x509 -noout -fingerprint)
same "$served" "$(openssl x509 -noout -fingerprint -in "$dir/nginx/cert.pem")"
ok "nginx's own certificate"

step 'HTTPS with another name: an alert, not a certificate'
has "$(refused openssl s_client -connect "127.0.0.1:${at[shard.https]}" -servername nobody.example < /dev/null)" \
  'unrecognized name'
ok

step '1 GB over HTTPS'
began=$(now)
same "$(c "https://$secure:${at[shard.https]}/big" | sha256sum | cut -d' ' -f1)" "$hash"
took=$(($(now) - began))
ok "$((1000000 / took)) MB/s, equal hashes"

proxy=http://127.0.0.1:${at[shard.proxy]}
target=http://shop-1:${at[nginx]}

step 'the proxy door without credentials: 407 and how to get some'
answer=$(curl -sS -x "$proxy" -w '%{http_code}' "$target/")
has "$answer" 'meshctl token create --access'
has "$answer" 407
ok

token=$(ctl token create --access prometheus 2>> "$dir/log/meshctl.log")
step 'the proxy door with a token: 403 without a rule'
answer=$(curl -sS -x "$proxy" --proxy-user "prometheus:$token" -w '%{http_code}' "$target/")
has "$answer" "meshctl policy allow --from user/prometheus --to edge/shop-1 --ports ${at[nginx]}"
ok
allow user/prometheus edge/shop-1 "${at[nginx]},${at[nginx.tls]}"

step 'the proxy door with a token: absolute-form, CONNECT, service by name'
same "$(curl -sS -x "$proxy" --proxy-user "prometheus:$token" "$target/")" 'hello from nginx'
same "$(curl -sS -x "$proxy" --proxy-user "prometheus:$token" -p "$target/")" 'hello from nginx'
same "$(curl -sS -x "$proxy" --proxy-user "prometheus:$token" "http://$web/")" 'hello from nginx'
same "$(curl -sS -x "$proxy" --proxy-user "prometheus:$token" --cacert "$dir/nginx/cert.pem" \
  --connect-to "secure.shop-1.$domain:443:shop-1:${at[nginx.tls]}" "https://secure.shop-1.$domain/")" 'hello from nginx'
ok

step 'the same port by SOCKS5: a page, a refused port, a wrong token'
socks=(-x "socks5h://localhost:${at[shard.proxy]}" --proxy-user "prometheus:$token")
same "$(curl -sS "${socks[@]}" "$target/")" 'hello from nginx'
same "$(curl -sS "${socks[@]}" "http://$web/")" 'hello from nginx'
words=$(refused curl -sS "${socks[@]}" http://shop-1:9/)
same "$(status)" 97
words=$(refused curl -sS -x "socks5h://localhost:${at[shard.proxy]}" --proxy-user prometheus:wrong "$target/")
same "$(status)" 97
ok "$words"

step 'a TCP door that tells nginx by PROXY protocol from where a visitor comes'
allow door/visitors service/visitors
same "$(curl -sS "http://127.0.0.1:${at[visitors]}/")" 'a visitor from 127.0.0.1'
ok

step 'the proxy door over TLS with the client certificate of a user'
allow group/admin edge/shop-1 "${at[nginx]}"
ctl token create --user alice --group admin 2>> "$dir/log/meshctl.log" | ctl --home "$dir/alice" login > /dev/null
tls_proxy=(-x "https://localhost:${at[shard.proxy]}" --proxy-cert "$dir/alice/identity.pem"
  --proxy-key "$dir/alice/identity.pem" --proxy-cacert "$dir/alice/bundle.pem")
same "$(curl -sS "${tls_proxy[@]}" "$target/")" 'hello from nginx'
same "$(curl -sS "${tls_proxy[@]}" -p "$target/")" 'hello from nginx'
ok

step 'hosts, edges and services that are not there'
answer=$(c -w '%{http_code}' "http://web.nobody.$domain:${at[shard.http]}/")
has "$answer" 404
has "$answer" nobody
has "$(c -w '%{http_code}' "http://other.example:${at[shard.http]}/")" 404
has "$(c -w '%{http_code}' "$door/nothing-here")" 404
ok '404, the text says what is unknown'

# raw TEXT: sends bytes to the HTTP door as they are, and prints the status lines of all answers.
raw() {
  exec 6<> "/dev/tcp/127.0.0.1/${at[shard.http]}"
  # shellcheck disable=SC2059 # the text has escapes
  printf "$1" > "$dir/raw"
  # In one piece: the door may close as soon as it has read enough.
  cat "$dir/raw" >&6
  # The answers end when the door closes, which it does behind a request that is no good.
  timeout 3 cat <&6 | grep -a -o 'HTTP/1.1 [0-9]*' | tr '\n' ' ' || true
  exec 6>&-
}

step 'pipelined requests are answered in their order'
three='' request="GET / HTTP/1.1\r\nHost: $web\r\n"
for _ in 1 2; do three+="$request\r\n"; done
three+="${request}Connection: close\r\n\r\n"
same "$(raw "$three")" 'HTTP/1.1 200 HTTP/1.1 200 HTTP/1.1 200 '
ok '3 of 3'

step 'request smuggling is answered with 400, and nothing behind it is served'
behind="GET /big HTTP/1.1\r\nHost: $web\r\n\r\n"
tried=0
while IFS= read -r head; do
  answer=$(raw "POST /up/x HTTP/1.1\r\n$head\r\n\r\n0\r\n\r\n$behind")
  [[ $answer == 'HTTP/1.1 400 ' ]] || fail "'$head' was answered: '${answer:-nothing}'"
  tried=$((tried + 1))
done << EOF
Host: $web\r\nContent-Length: 5\r\nTransfer-Encoding: chunked
Host: $web\r\nTransfer-Encoding: chunked\r\nContent-Length: 5
Host: $web\r\nContent-Length: 5\r\nContent-Length: 6
Host: $web\r\nContent-Length: +5
Host: $web\r\nContent-Length: 5, 6
Host: $web\r\nTransfer-Encoding: xchunked
Host: $web\r\nTransfer-Encoding : chunked
Host: $web\r\nTransfer-Encoding: chunked, identity
Host: $web\r\nTransfer-Encoding: \x0bchunked
Host: $web\r\nHost: secure.shop-1.$domain\r\nContent-Length: 0
X: 1\r\n folded: 2\r\nHost: $web
Content-Length: 0
EOF
same "$(c "$door/")" 'hello from nginx'
ok "$tried ways"
