#!/bin/sh
# Writes .env from .env.example, for its owner alone, with a random value for every empty one.
set -eu
umask 077
cd "$(dirname "$0")/.."
if [ -e .env ]; then
    echo ".env is there already; expected none" >&2
    exit 1
fi
while IFS= read -r line; do
    case "$line" in
        *=) echo "$line$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" ;;
        *) echo "$line" ;;
    esac
done < .env.example > .env.new
mv .env.new .env
