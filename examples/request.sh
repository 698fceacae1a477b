#!/bin/sh
# Nothing but curl: submit to the queue, follow until it is done, fetch the picture.
#
#     FAL_KEY=me:secret sh examples/request.sh [SERVER]

set -eu
server=${1:-http://127.0.0.1:8000}
key="Authorization: Key ${FAL_KEY:-any:thing}"
value() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p"; }  # of a text in JSON on one line

receipt=$(curl --fail --silent "$server/queue/fal-ai/flux/dev" -H "$key" -H 'Content-Type: application/json' \
  -d '{"prompt": "an orange circle at the bottom", "image_size": {"width": 128, "height": 128}, "seed": 2}')

# a line for each change; the connection ends with the request
curl --fail --silent --no-buffer "$(echo "$receipt" | value status_url)/stream?logs=1" -H "$key"

result=$(curl --fail --silent "$(echo "$receipt" | value response_url)" -H "$key")
mkdir -p out
curl --fail --silent --location --output out/curl.jpg "$(echo "$result" | value url)"
echo out/curl.jpg
