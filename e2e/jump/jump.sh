#!/usr/bin/env bash
# jump: stock OpenSSH through the SSH doors of two shards, with certificates and keys, and what happens to those who may not.
source "$(dirname "$0")/../lib.sh"

user=$(id -un)
port sshd
ssh-keygen -q -t ed25519 -N '' -f "$dir/sshd_key"
for key in inner alice bob robot stranger; do ssh-keygen -q -t ed25519 -N '' -C "$key" -f "$dir/$key"; done
ssh_server "${at[sshd]}" "$dir/sshd_key" "$dir/inner.pub"
start sshd "$(command -v sshd)" -D -e -f "$dir/sshd_config"
wait_for 10 listening "${at[sshd]}"

ssh_doors=1
control
shard
another_shard shard-2
edge shop-1 ssh ssh "127.0.0.1:${at[sshd]}"
edge shop-2 ssh ssh "127.0.0.1:${at[sshd]}"
edges_ready shop-1 shop-2

# as NAME COMMAND...: meshctl as another user than the administrator.
as() {
  local name=$1
  shift
  CAUSEWAY_HOME=$dir/home.$name meshctl "$@"
}
for name in alice bob; do
  ctl token create --user "$name" --group people 2>> "$dir/log/meshctl.log" | as "$name" login > /dev/null
done
allow user/alice 'edge/shop-*' '*'
allow user/robot edge/shop-1 "${at[sshd]}"

# Every shard proves itself by its certificate: there is one line for both, and nobody is asked.
ctl ssh-config --known-hosts --jump "127.0.0.1:${at[shard.ssh]}" --jump "127.0.0.1:${at[shard-2.ssh]}" > "$dir/known_hosts"
echo "[localhost]:${at[sshd]},shop-1,shop-2,[shop-1]:${at[sshd]},[shop-2]:${at[sshd]} $(cut -d' ' -f1,2 "$dir/sshd_key.pub")" \
  >> "$dir/known_hosts"

# ssh_config WHO [DOOR]: what WHO would write into ~/.ssh/config.
ssh_config() {
  cat << EOF
Host jump
  HostName 127.0.0.1
  Port ${at[${2:-shard.ssh}]}
  IdentityFile $dir/$1
  LogLevel INFO
Host shop-* ssh.shop-*
  User $user
  Port ${at[sshd]}
  ProxyJump jump
  IdentityFile $dir/inner
Host *
  IdentitiesOnly yes
  UserKnownHostsFile $dir/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  BatchMode yes
  LogLevel ERROR
EOF
}
for name in alice bob robot stranger; do ssh_config "$name" > "$dir/config.$name"; done
ssh_config alice shard-2.ssh > "$dir/config.alice-2"
# by WHO COMMAND...: ssh, scp or sftp as WHO.
by() {
  local who=$1 program=$2
  shift 2
  "$program" -F "$dir/config.$who" "$@"
}

host_certified() { [[ $(metric "$1" mesh_shard_ssh_host_certificate_not_after) != 0 ]]; }
step 'both shards have a host certificate of control'
wait_for 10 host_certified "${at[shard.admin]}"
wait_for 10 host_certified "${at[shard-2.admin]}"
has "$(ssh-keygen -L -f "$dir/shard-1/ssh_host_ed25519_key-cert.pub")" 'host certificate'
same "$(stat -c %a "$dir/shard-1/ssh_host_ed25519_key")" 600
ok

step 'a certificate from meshctl ssh-cert'
has "$(as alice ssh-cert --key "$dir/alice.pub")" 'alice-cert.pub names alice and ends in 11h'
has "$(ssh-keygen -L -f "$dir/alice-cert.pub")" 'groups@causeway'
ok

step 'ssh -J with the certificate'
same "$(by alice ssh shop-1 'cat; echo to-stderr >&2' <<< 'through standard input' 2> "$dir/stderr")" 'through standard input'
same "$(cat "$dir/stderr")" to-stderr
for wanted in 0 1 42 255; do
  status=0
  by alice ssh shop-1 "exit $wanted" || status=$?
  same "$status" "$wanted"
done
has "$(by alice ssh -tt shop-1 tty < /dev/null)" /dev/pts/
ok 'standard input, output and error, exit status, a terminal'

step 'as it stands in the manual: ssh -J, without any configuration for the edge'
same "$(by alice ssh -J jump -p "${at[sshd]}" -i "$dir/inner" -o "HostKeyAlias=shop-1" "$user@shop-1.$domain" echo hello)" hello
same "$(by alice ssh -J jump -i "$dir/inner" -o "HostKeyAlias=shop-1" "$user@ssh.shop-1.$domain" echo hello)" hello
ok "shop-1.$domain, and the service ssh.shop-1.$domain"

step 'a registered key, without a certificate'
has "$(refused by robot ssh shop-1 true)" 'Permission denied (publickey)'
ctl user key add robot --key "$dir/robot.pub" > /dev/null
known() { by robot ssh shop-1 true; }
wait_for 5 known
has "$(ctl user key ls robot)" SHA256
ok

step 'a key that nobody knows'
has "$(refused by stranger ssh shop-1 true)" 'Permission denied (publickey)'
ok

step 'a certificate that has ended, and one of another authority'
ssh-keygen -q -s "$dir/control/ssh-user-ca" -I old -n alice -V -2h:-1h "$dir/stranger.pub"
has "$(refused by stranger ssh shop-1 true)" 'Permission denied'
ssh-keygen -q -t ed25519 -N '' -f "$dir/other-ca"
ssh-keygen -q -s "$dir/other-ca" -I other -n alice -V +1h "$dir/stranger.pub"
has "$(refused by stranger ssh shop-1 true)" 'Permission denied'
ssh-keygen -q -s "$dir/control/ssh-user-ca" -I forced -n alice -O force-command=ls -V +1h "$dir/stranger.pub"
has "$(refused by stranger ssh shop-1 true)" 'Permission denied'
rm "$dir/stranger-cert.pub"
ok 'nor one with a critical option'

step 'without a rule, the refusal names the rule that is missing'
as bob ssh-cert --key "$dir/bob.pub" --ttl 1h > /dev/null
words=$(refused by bob ssh shop-1 true)
has "$words" 'administratively prohibited'
has "$words" "meshctl policy allow --from user/bob --to edge/shop-1 --ports ${at[sshd]}"
has "$(refused by alice ssh -J jump "$user@shop-9" true)" 'no edge shop-9 is enrolled'
ok

step 'a jump host is nothing else'
has "$(refused by alice ssh jump)" 'this is a jump host'
has "$(refused by alice ssh jump ls)" 'this is a jump host'
has "$(refused by alice sftp jump)" 'this is a jump host'
port remote
has "$(refused by alice ssh -N -o ExitOnForwardFailure=yes -R "${at[remote]}:localhost:1" jump)" 'forwarding failed'
ok 'no shell, no command, no sftp, no remote forward'

step 'ssh -J -L: a port behind the edge'
services behind
port forwarded
start forward ssh -F "$dir/config.alice" -N -L "127.0.0.1:${at[forwarded]}:127.0.0.1:${at[behind.http]}" shop-1
wait_for 10 listening "${at[forwarded]}"
same "$(get "http://localhost:${at[forwarded]}/" --connect "127.0.0.1:${at[forwarded]}")" 'hello from behind'
stop forward
ok

step 'ssh -L at the jump host itself: a port of the edge, many streams in one connection'
start direct ssh -F "$dir/config.alice" -N -L "127.0.0.1:${at[forwarded]}:shop-1:${at[sshd]}" jump
wait_for 10 listening "${at[forwarded]}"
for _ in 1 2 3 4; do
  same "$(by alice ssh -p "${at[forwarded]}" -o ProxyJump=none -o HostKeyAlias=shop-1 -i "$dir/inner" "$user@localhost" echo hello)" hello
done
stop direct
ok

step 'through the shard that does not hold the edge'
for edge in shop-1 shop-2; do
  same "$(by alice ssh "$edge" echo hello)" hello
  same "$(by alice-2 ssh "$edge" echo hello)" hello
done
ok 'two edges, by two doors'

random_file file 200
hash=$(hash_of "$dir/file")
mkdir "$dir/there" "$dir/back"

step 'scp -J, 200 MB there and back'
there=$(moved 200 by alice scp "$dir/file" "shop-1:$dir/there/scp")
back=$(moved 200 by alice scp "shop-1:$dir/there/scp" "$dir/back/scp")
same "$(hash_of "$dir/there/scp")" "$hash"
same "$(hash_of "$dir/back/scp")" "$hash"
ok "$there there, $back back, equal hashes"

step 'sftp, 100 MB there and back'
random_file file 100
hash=$(hash_of "$dir/file")
there=$(moved 100 by alice sftp -b /dev/stdin shop-1 <<< "put $dir/file $dir/there/sftp")
back=$(moved 100 by alice sftp -b /dev/stdin shop-1 <<< "get $dir/there/sftp $dir/back/sftp")
same "$(hash_of "$dir/there/sftp")" "$hash"
same "$(hash_of "$dir/back/sftp")" "$hash"
ok "$there there, $back back, equal hashes"

step 'the same by ProxyCommand=meshctl proxy'
proxy="ProxyCommand=env CAUSEWAY_HOME=$dir/home.alice meshctl proxy %h:%p"
there=$(moved 100 by alice scp -o ProxyJump=none -o "$proxy" "$dir/file" "shop-1:$dir/there/proxy")
back=$(moved 100 by alice scp -o ProxyJump=none -o "$proxy" "shop-1:$dir/there/proxy" "$dir/back/proxy")
same "$(hash_of "$dir/back/proxy")" "$hash"
ok "$there there, $back back, equal hashes"

step 'every channel leaves a record'
stop_recorded() { grep -q '"door":"ssh"' "$dir/log/shard-1.access"; }
wait_for 5 stop_recorded
has "$(grep '"door":"ssh"' "$dir/log/shard-1.access")" 'user/alice'
has "$(grep '"door":"ssh"' "$dir/log/shard-1.access")" 'user/bob'
ok "$(grep -c '"door":"ssh"' "$dir/log/shard-1.access") of them"

step 'meshctl ssh --record writes what is shown'
as alice ssh --record "$dir/session.cast" "$user@shop-1" -F "$dir/config.alice" -p "${at[sshd]}" -o ProxyJump=none \
  -o StrictHostKeyChecking=accept-new -tt 'echo recorded; exit 7' > "$dir/shown" < /dev/null || same $? 7
has "$(cat "$dir/shown")" recorded
has "$(head -n 1 "$dir/session.cast")" '"version":2'
has "$(cat "$dir/session.cast")" 'recorded'
same "$(stat -c %a "$dir/session.cast")" 600
ok "$(wc -l < "$dir/session.cast") lines"

# A session that says something every moment, until it is ended.
session() { start "$1" ssh -F "$dir/config.$2" shop-1 'while echo tick; do sleep 0.1; done'; }
ticks() { grep -q tick "$dir/log/$1.out"; }

step 'a user who is revoked loses the session, by certificate and by key'
session live alice
session keyed robot
wait_for 10 ticks live
wait_for 10 ticks keyed
began=$(now)
ctl user revoke alice --yes > /dev/null
ctl user revoke robot --yes > /dev/null
dead() { gone "${pid[$1]}"; }
wait_for 5 dead live
wait_for 5 dead keyed
took=$(since "$began")
wait "${pid[live]}" || true
wait "${pid[keyed]}" || true
unset 'pid[live]' 'pid[keyed]'
has "$(refused by alice ssh shop-1 true)" 'Permission denied'
has "$(refused by robot ssh shop-1 true)" 'Permission denied'
ok "both within $took, and they do not get in again"

step 'a shard drains: a session goes on until it ends, and an idle connection is let go'
allow group/people 'edge/shop-*' '*'
sed -i 's/^drain_secs = .*/drain_secs = 20/' "$dir/shard-2.toml"
stop shard-2
start_shard shard-2
wait_for 20 ready "${at[shard-2.admin]}"
ssh_config bob shard-2.ssh > "$dir/config.bob-2"
reach() { by bob-2 ssh shop-1 true; }
wait_for 20 reach
start leaving ssh -F "$dir/config.bob-2" shop-1 "echo begun; while [[ ! -e $dir/enough ]]; do sleep 0.1; done; echo ended"
start idle ssh -F "$dir/config.bob-2" -N jump
begun() { grep -q begun "$dir/log/leaving.out"; }
wait_for 10 begun
kill -TERM "${pid[shard-2]}"
wait_for 10 dead idle
running leaving || fail 'the session ended with the drain'
touch "$dir/enough"
wait_for 10 dead leaving
wait_for 10 dead shard-2
has "$(cat "$dir/log/leaving.out")" ended
wait "${pid[leaving]}" || fail 'the session did not end well'
unset 'pid[leaving]' 'pid[idle]' 'pid[shard-2]'
ok

step 'nothing panicked on the way'
for name in control shard-1 shard-2 shop-1 shop-2; do
  if grep -q 'panicked' "$dir/log/$name.log"; then fail "$name panicked"; fi
done
ok
