#!/bin/sh
# Starts the server with redis.conf beside this file. The password comes in REDISCLI_AUTH, where
# valkey-cli looks for it, too, and goes in on standard input, so that no list of processes shows it.
set -eu
: "${REDISCLI_AUTH:?expected the password of Redis, letters and digits}"
case "$REDISCLI_AUTH" in
    *[!A-Za-z0-9]*) echo "REDISCLI_AUTH: expected letters and digits only" >&2; exit 1 ;;
esac
folder=$(cd "$(dirname "$0")" && pwd)
exec valkey-server - <<CONFIGURATION
include "$folder/redis.conf"
requirepass $REDISCLI_AUTH
CONFIGURATION
