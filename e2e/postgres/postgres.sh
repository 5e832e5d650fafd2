#!/usr/bin/env bash
# postgres: PostgreSQL behind an edge; psql and pgbench reach it by a TCP door and by meshctl forward.
source "$(dirname "$0")/../lib.sh"

# PostgreSQL refuses to run as root.
as_postgres() { "$@"; }
mkdir "$dir/pg"
if [[ $(id -u) == 0 ]]; then
  chown postgres "$dir/pg"
  as_postgres() { setpriv --reuid=postgres --regid=postgres --init-groups --reset-env "$@"; }
fi
cd "$dir/pg"
port pg
as_postgres "$(command -v initdb)" -D "$dir/pg/data" -U postgres --auth=trust --no-sync > "$dir/log/initdb.out" 2>&1
as_postgres "$(command -v pg_ctl)" -D "$dir/pg/data" -l "$dir/pg/server.log" -w start -o "-p ${at[pg]} -k $dir/pg \
  -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=100" > /dev/null
clean_up() { as_postgres "$(command -v pg_ctl)" -D "$dir/pg/data" -m immediate stop > /dev/null 2>&1; }

control
door database shop-1/pg
shard
edge shop-1 pg tcp "127.0.0.1:${at[pg]}"
edges_ready shop-1
allow door/database service/pg
allow group/admin service/pg

sql() { psql -h 127.0.0.1 -p "$1" -U postgres -X -A -t -q "${@:2}"; }

step 'psql through a TCP door'
same "$(sql "${at[database]}" -c 'select 6 * 7')" 42
ok

step 'COPY of 100 MB into a table and out again'
sql "${at[database]}" -c 'create table lines (line text)'
base64 -w 99 < <(random_file bytes 75 && cat "$dir/bytes") > "$dir/lines"
began=$(now)
sql "${at[database]}" -c '\copy lines from pstdin' < "$dir/lines"
sql "${at[database]}" -c '\copy lines to pstdout' > "$dir/back"
took=$(($(now) - began))
same "$(hash_of "$dir/back")" "$(hash_of "$dir/lines")"
ok "$(($(stat -c %s "$dir/lines") * 2 / 1000 / took)) MB/s, equal hashes"

# bench PORT: pgbench for a few seconds; its transactions per second.
bench() {
  pgbench -h 127.0.0.1 -p "$1" -U postgres -n -S -c 16 -j 2 -T 4 "${@:2}" postgres 2> /dev/null |
    awk '/^tps/ { printf "%d\n", $3 } /failed transactions/ { if ($5 + 0 > 0) exit 1 }'
}

step 'pgbench with 16 clients through the TCP door'
pgbench -h 127.0.0.1 -p "${at[database]}" -U postgres -i -q -s 5 postgres > "$dir/log/pgbench.log" 2>&1
mesh=$(bench "${at[database]}")
directly=$(bench "${at[pg]}")
((mesh > 0)) || fail 'no transaction went through'
ok "$mesh transactions/s, and $directly/s without the mesh"

step 'psql and pgbench through meshctl forward'
port local
start forward meshctl forward shop-1/pg "${at[local]}"
wait_for 10 listening "${at[local]}"
same "$(sql "${at[local]}" -c 'select 6 * 7')" 42
forwarded=$(bench "${at[local]}" -C -c 4)
((forwarded > 0)) || fail 'no transaction went through'
ok "$forwarded transactions/s with a new connection for each"

step 'a query that is cancelled'
# psql cancels by a second connection while the first one is in use.
began=$(now)
refused timeout -s INT 1 psql -h 127.0.0.1 -p "${at[database]}" -U postgres -X -c 'select pg_sleep(30)' > "$dir/cancel"
has "$(cat "$dir/cancel")" 'canceling statement due to user request'
ok
