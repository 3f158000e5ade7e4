#!/usr/bin/env bash
# Installs Debian's Chromium, for the tests of pages.
exec "$(dirname "$0")/../debian.sh" chromium chromium fonts-dejavu-core
