#!/bin/sh
# Talk to a running server (vllm serve MODEL) with curl alone: sh examples/chat.sh [URL]
set -eu
url=${1:-http://localhost:8000}

echo "models:"
curl -sS --fail-with-body "$url/v1/models"
echo

echo "a chat; max_tokens is the length of the canvas, options of the plugin go into vllm_xargs:"
curl -sS --fail-with-body "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "Reverse: stream"}],
  "max_tokens": 32,
  "vllm_xargs": {"d2cache_policy": "d2cache", "d2cache_threshold": 0.9}
}'
echo

echo "the same, streamed:"
curl -sSN --fail-with-body "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "Reverse: stream"}],
  "max_tokens": 32,
  "stream": true
}'

echo "an option that does not exist is refused, with the list of those that do:"
curl -sS "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "prompt": "abc",
  "max_tokens": 32,
  "vllm_xargs": {"d2cache_windw": 8}
}'
echo
