#!/bin/bash
# cargo calls this in place of rustc for the workspace's own crates (.cargo/config.toml): the CNI plugin is linked statically.
# It lives for some 3 ms, a third of which went into the start and end of its process; no profile can say it for one program.
# Not sh: cargo sets variables with dashes in their names, which Debian's sh does not hand on.
case " $* " in
*" --crate-name sluice_cni "*" --crate-type bin "*) set -- "$@" -C target-feature=+crt-static ;;
esac
exec "$@"
