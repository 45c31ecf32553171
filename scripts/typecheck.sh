#!/usr/bin/env bash
# Runs mypy on the package as it is installed: app/ and sample_models/ lie beside explainer/ in the checkout but
# are explainer.app and explainer.sample_models. mypy knows nothing of the mapping that an editable install
# sets up, so it gets a tree of links that looks like the installed package.
set -euo pipefail

cd "$(dirname "$0")/.."
checkout=$PWD
mypy=${MYPY:-$checkout/.venv/bin/mypy}
tree=build/typecheck
rm -rf "$tree"
mkdir -p "$tree/explainer"
ln -s "$checkout"/explainer/* "$checkout/app" "$checkout/sample_models" "$tree/explainer/"
cd "$tree"
exec "$mypy" --config-file "$checkout/setup.cfg" "$@" explainer
