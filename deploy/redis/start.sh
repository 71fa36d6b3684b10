#!/bin/sh
# Starts the server with redis.conf and users.acl beside this file. The password of the user default,
# who is the operator, comes in REDISCLI_AUTH, where valkey-cli looks for it, too; that of each user
# of users.acl in <USER>_PASSWORD. They go in on standard input, so that no list of processes shows
# them.
set -eu
folder=$(cd "$(dirname "$0")" && pwd)

# The value of the variable $1, in $password.
look_up() {
    eval "password=\${$1:-}"
    case "$password" in
        "" | *[!A-Za-z0-9]*)
            echo "$1: expected a password of Redis, letters and digits only" >&2
            exit 1
            ;;
    esac
}

look_up REDISCLI_AUTH
users="requirepass $password"
while IFS= read -r line; do
    case "$line" in
        "user "*)
            rules=${line#user }
            user=${rules%% *}
            case "$user" in
                *[!a-z]*) echo "users.acl: user $user; expected small letters" >&2; exit 1 ;;
            esac
            look_up "$(echo "$user" | tr '[:lower:]' '[:upper:]')_PASSWORD"
            users="$users
user $user on >$password ${rules#* }"
            ;;
    esac
done < "$folder/users.acl"
exec valkey-server - <<CONFIGURATION
include "$folder/redis.conf"
$users
CONFIGURATION
