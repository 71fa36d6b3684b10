#!/bin/sh
# Writes .env from .env.example, for its owner alone, with a random value for every empty one.
set -eu
umask 077
cd "$(dirname "$0")/.."
if [ -e .env ]; then
    echo ".env is there already; expected none" >&2
    exit 1
fi
trap 'rm -f .env.new' EXIT
while IFS= read -r line; do
    case "$line" in
        *=)
            value=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
            if [ ${#value} -ne 48 ]; then
                echo "no random value came of od and /dev/urandom; .env is not written" >&2
                exit 1
            fi
            echo "$line$value"
            ;;
        *) echo "$line" ;;
    esac
done < .env.example > .env.new
mv .env.new .env
