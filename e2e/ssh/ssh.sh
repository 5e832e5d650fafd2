#!/usr/bin/env bash
# ssh: OpenSSH's server behind an edge; ssh, scp, sftp and rsync reach it through the mesh.
source "$(dirname "$0")/../lib.sh"

user=$(id -un)
port sshd
ssh_files "${at[sshd]}"
start sshd "$(command -v sshd)" -D -e -f "$dir/sshd_config"
wait_for 10 listening "${at[sshd]}"

control
shard
edge shop-1 ssh ssh "127.0.0.1:${at[sshd]}"
edges_ready shop-1

config=(-F "$dir/ssh_config")

step 'without a rule ssh is refused, and the refusal names the rule that is missing'
words=$(refused ssh "${config[@]}" shop-1 true)
has "$words" "meshctl policy allow --from user/admin --to edge/shop-1 --ports ${at[sshd]}"
ok "exit status $(status)"
allow group/admin 'edge/shop-*' "${at[sshd]}"

step 'meshctl ssh runs a command'
same "$(ctl ssh "$user@shop-1" -F "$dir/ssh_config" -p "${at[sshd]}" echo hello)" hello
ok

step 'ssh with ProxyCommand=meshctl proxy'
same "$(ssh "${config[@]}" shop-1 'cat; echo to-stderr >&2' <<< 'through standard input' 2> "$dir/stderr")" \
  'through standard input'
same "$(cat "$dir/stderr")" to-stderr
ok 'standard input, output and error each arrive'

step 'exit status passes through'
for wanted in 0 1 42 255; do
  status=0
  ssh "${config[@]}" shop-1 "exit $wanted" || status=$?
  same "$status" "$wanted"
done
ok '0 1 42 255'

step 'a terminal'
has "$(ssh -tt "${config[@]}" shop-1 'tty; stty size' < /dev/null)" /dev/pts/
ok

step 'ssh -L through the mesh'
services behind
port forwarded
start forward ssh "${config[@]}" -N -L "127.0.0.1:${at[forwarded]}:127.0.0.1:${at[behind.http]}" shop-1
wait_for 10 listening "${at[forwarded]}"
same "$(get "http://localhost:${at[forwarded]}/" --connect "127.0.0.1:${at[forwarded]}")" 'hello from behind'
stop forward
ok

random_file file 500
hash=$(hash_of "$dir/file")
mkdir "$dir/there" "$dir/back"

step 'rsync, 500 MB there and back'
transport="ssh -F $dir/ssh_config"
there=$(moved 500 rsync -W -e "$transport" "$dir/file" "shop-1:$dir/there/rsync")
back=$(moved 500 rsync -W -e "$transport" "shop-1:$dir/there/rsync" "$dir/back/rsync")
same "$(hash_of "$dir/back/rsync")" "$hash"
ok "$there there, $back back, equal hashes"

step 'scp, 500 MB there and back'
there=$(moved 500 scp "${config[@]}" "$dir/file" "shop-1:$dir/there/scp")
back=$(moved 500 scp "${config[@]}" "shop-1:$dir/there/scp" "$dir/back/scp")
same "$(hash_of "$dir/there/scp")" "$hash"
same "$(hash_of "$dir/back/scp")" "$hash"
rm "$dir/there/scp" "$dir/back/scp"
ok "$there there, $back back, equal hashes"

step 'sftp, 500 MB there and back'
there=$(moved 500 sftp "${config[@]}" -b /dev/stdin shop-1 <<< "put $dir/file $dir/there/sftp")
back=$(moved 500 sftp "${config[@]}" -b /dev/stdin shop-1 <<< "get $dir/there/sftp $dir/back/sftp")
same "$(hash_of "$dir/there/sftp")" "$hash"
same "$(hash_of "$dir/back/sftp")" "$hash"
rm "$dir/there/sftp" "$dir/back/sftp"
ok "$there there, $back back, equal hashes"

token=$(ctl token create --access robot 2>> "$dir/log/meshctl.log")
allow user/robot edge/shop-1 "${at[sshd]}"

step 'nc -X connect at the proxy door: with a token, and without'
# nc asks for the password at a terminal and nowhere else, and forgets what was typed before it asked.
type_token() {
  wait_for 5 grep -q password "$dir/typescript"
  echo "$token"
  wait_for 5 grep -q SSH-2.0 "$dir/typescript" || true
}
type_token | timeout 15 script -qfec \
  "nc -w 2 -X connect -x 127.0.0.1:${at[shard.proxy]} -P robot shop-1 ${at[sshd]}" "$dir/typescript" > /dev/null || true
banner=$(tr -d '\r' < "$dir/typescript")
has "$banner" SSH-2.0-OpenSSH
has "$(refused nc -w 2 -X connect -x "127.0.0.1:${at[shard.proxy]}" shop-1 "${at[sshd]}" < /dev/null)" '407'
ok "$(grep -o 'SSH-2.0[^ ]*' <<< "$banner"); 407 without"

step 'ssh through the proxy door, by CONNECT with the token'
cat > "$dir/connect" << 'EOF'
#!/usr/bin/env bash
# connect DOOR-PORT TARGET: CONNECT with the token of the environment, then standard input and output.
exec 3<> "/dev/tcp/127.0.0.1/$1"
printf 'CONNECT %s HTTP/1.1\r\nHost: %s\r\nProxy-Authorization: Bearer %s\r\n\r\n' "$2" "$2" "$TOKEN" >&3
IFS= read -r status <&3
[[ $status == *' 200 '* ]] || { echo "$status" >&2; exit 1; }
while IFS= read -r line <&3 && [[ $line != $'\r' ]]; do :; done
cat <&3 &
cat >&3
wait
EOF
chmod +x "$dir/connect"
same "$(TOKEN=$token ssh "${config[@]}" -o "ProxyCommand=$dir/connect ${at[shard.proxy]} %h:%p" \
  shop-1 echo hello)" hello
ok
