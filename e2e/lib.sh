# Sourced by every story: a mesh of real processes (scripts/mesh.sh), and the words in which a story is told.
# shellcheck shell=bash
# shellcheck source=scripts/mesh.sh
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/mesh.sh"

step=''
step_began=0

# step WHAT: what is tried next. ok [FIGURES]: it worked.
step() {
  step=$1
  step_began=$(now)
}
ok() {
  printf '  ok    %s%s  [%s]\n' "$step" "${1:+: $1}" "$(since "$step_began")"
  step=''
}

# not_here WHY: a step that this machine cannot do.
not_here() {
  printf '  --    %s: not here (%s)\n' "$step" "$1"
  step=''
}

fail() {
  echo "        $*" >&2
  exit 1
}

# Said by scripts/mesh.sh when a story breaks off, before the logs are gone.
complain() {
  printf '  FAIL  %s (exit status %s)\n' "${step:-before the first step}" "$1"
  local log
  for log in "$dir"/log/*.log; do
    [[ -s $log ]] || continue
    printf '        --- %s\n' "${log##*/}" >&2
    tail -n "${CAUSEWAY_TAIL:-8}" "$log" | sed 's/^/        /' >&2
  done
}
trap 'echo "        ${BASH_SOURCE[0]##*/}:$LINENO: $BASH_COMMAND" >&2' ERR
set -E

# same GOT WANTED
same() { [[ $1 == "$2" ]] || fail "got '$1' instead of '$2'"; }
# has TEXT PART: whether a text has a part; a part may be a pattern.
has() {
  # shellcheck disable=SC2053 # the part is meant as a pattern
  [[ $1 == *$2* ]] || fail "'$2' is not in: $1"
}
# below GOT LIMIT WHAT: numbers, with a point or without.
below() { awk -v got="$1" -v limit="$2" 'BEGIN { exit !(got + 0 < limit + 0) }' || fail "$3 is $1, not below $2"; }
# refused COMMAND...: runs what must fail and prints what it says, both outputs; its status is in the file `status`.
refused() {
  local status=0
  "$@" 2>&1 || status=$?
  echo "$status" > "$dir/status"
  [[ $status != 0 ]]
}
status() { cat "$dir/status"; }

# figure NAME TEXT: the value of NAME=VALUE in a text.
figure() { grep -o "\b$1=[^ ]*" <<< "$2" | head -n 1 | cut -d= -f2; }
mib() { awk -v kib="$1" 'BEGIN { printf "%.1f MiB", kib / 1024 }'; }

# services NAME [DNS-NAME...]: mesh-loadtest's little services: at[NAME.http], at[NAME.tricks], and with names https.
services() {
  local name=$1 arguments=()
  shift
  port "$name.http" "$name.tricks"
  if [[ $# -gt 0 ]]; then
    port "$name.https"
    arguments=(--https "127.0.0.1:${at[$name.https]}" --ca-out "$dir/$name.ca.pem")
    while [[ $# -gt 0 ]]; do arguments+=(--dns "$1") && shift; done
  fi
  start "$name.services" mesh-loadtest serve --name "$name" --http "127.0.0.1:${at[$name.http]}" \
    --tricks "127.0.0.1:${at[$name.tricks]}" "${arguments[@]}"
  wait_for 10 grep -q ready "$dir/log/$name.services.out"
}

# random_file NAME MB: bytes that no compression makes smaller, quickly.
random_file() {
  openssl enc -aes-128-ctr -pass "pass:$1" -nosalt -in /dev/zero 2> /dev/null | head -c "$(($2 * 1000000))" > "$dir/$1" || true
  [[ $(stat -c %s "$dir/$1") == $(($2 * 1000000)) ]]
}
hash_of() { sha256sum < "$1" | cut -d' ' -f1; }

# ssh_server PORT KEY AUTHORIZED: $dir/sshd_config, for OpenSSH's server on that port of loopback.
ssh_server() {
  mkdir -p /run/sshd 2> /dev/null || true
  cat > "$dir/sshd_config" << EOF
ListenAddress 127.0.0.1
Port $1
HostKey $2
AuthorizedKeysFile $3
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding yes
Subsystem sftp internal-sftp
EOF
}
# ssh_files PORT: keys, and configurations of OpenSSH's server and client, for a server on that port of an edge's loopback.
ssh_files() {
  ssh-keygen -q -t ed25519 -N '' -f "$dir/host_key"
  ssh-keygen -q -t ed25519 -N '' -f "$dir/user_key"
  cp "$dir/user_key.pub" "$dir/authorized_keys"
  ssh_server "$1" "$dir/host_key" "$dir/authorized_keys"
  # What a person would write once into ~/.ssh/config.
  cat > "$dir/ssh_config" << EOF
Host shop-*
  User $(id -un)
  Port $1
  ProxyCommand meshctl proxy %h:%p
Host *
  IdentityFile $dir/user_key
  IdentitiesOnly yes
  UserKnownHostsFile $dir/known_hosts
  StrictHostKeyChecking accept-new
  BatchMode yes
  LogLevel ERROR
EOF
}

# moved MB COMMAND...: times a transfer and prints its rate.
moved() {
  local began took mb=$1
  shift
  began=$(now)
  "$@" > "$dir/transfer.log" 2>&1 || fail "$(tail -n 3 "$dir/transfer.log")"
  took=$(($(now) - began))
  echo "$((mb * 1000 / took)) MB/s"
}

# told CAUSE STATUS WORDS WHAT: what `meshctl why WHAT` must say, soon; $sentence is what it said.
told() {
  local cause=$1 wanted=$2 words=$3 what=$4
  # shellcheck disable=SC2317 # run by wait_for
  names_it() {
    local status=0
    ctl why "$what" -o json > "$dir/why" 2>> "$dir/log/meshctl.log" || status=$?
    echo "$status" > "$dir/status"
    grep -q "\"cause\": \"$cause\"" "$dir/why" && grep -qF -e "$words" "$dir/why"
  }
  wait_for 25 names_it || fail "$(cat "$dir/why")"
  same "$(status)" "$wanted"
  # shellcheck disable=SC2034 # for the story
  sentence=$(grep -o '"sentence": "[^"]*"' "$dir/why" | cut -d'"' -f4)
}
