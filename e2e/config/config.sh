#!/usr/bin/env bash
# config: a wrong key names file, line and column; --check-config says so before anything starts.
source "$(dirname "$0")/../lib.sh"

# wrong PROGRAM LINE COLUMN PART TEXT: a configuration that is wrong at that place.
wrong() {
  local program=$1 place=$2:$3 part=$4 words file=$dir/$1.toml
  printf '%b' "$5" > "$file"
  words=$(refused "$program" --check-config --config "$file")
  has "$words" "$file:$place"
  has "$words" "$part"
}

for program in mesh-control mesh-cloud mesh-edge; do
  step "$program: unknown key, wrong type, no TOML, no file"
  wrong "$program" 3 1 'unknown field ?nonsense?' '# a comment\n\nnonsense = 1\n'
  wrong "$program" 2 3 'unknown field ?levle?' '[log]\n  levle = "info"\n'
  wrong "$program" 1 9 'invalid type' 'admin = 5\n'
  wrong "$program" 2 1 '' 'data_dir = "x"\n= 5\n'
  words=$(refused "$program" --check-config --config "$dir/nobody.toml")
  has "$words" "$dir/nobody.toml"
  ok
  step "$program: a good configuration, and none at all"
  printf 'data_dir = "%s"\n' "$dir/data" > "$dir/good.toml"
  "$program" --check-config --config "$dir/good.toml" > /dev/null 2>&1
  "$program" --check-config > /dev/null 2>&1
  ok 'exit status 0, and nothing was started'
done

step '--set goes over the file, and its mistakes are named'
mesh-edge --check-config --config "$dir/good.toml" --set log.level=debug --set 'limits.streams=7' > /dev/null 2>&1
has "$(refused mesh-edge --check-config --set limits.streems=7)" 'streems'
has "$(refused mesh-cloud --check-config --set nonsense)" 'key=value'
ok

step 'a secret in an argument is refused'
has "$(refused mesh-edge join "causeway://a.b@127.0.0.1:1?ca=sha256:$(printf '%064d' 0)")" 'secret'
has "$(refused mesh-control --check-config --set database=postgres://mesh:swordfish@db/mesh)" 'database_file'
ok

step 'every program tells its version and helps'
for program in mesh-control mesh-cloud mesh-edge meshctl mesh-loadtest; do
  has "$($program --version)" "$program"
  has "$($program --help)" Usage
done
ok
