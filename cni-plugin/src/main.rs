//! `sluice-cni`: reads one request, carries it out, answers. See `command`.

use sluice_cni::{Error, command, config::Config, loopback, result::error_result, spec::Environment};
use std::{
    io::{Read, Write},
    process::ExitCode,
};

/// Configurations are some hundred bytes; GC's lists every attachment of the node.
const STDIN_MAX: u64 = 4 << 20;

fn main() -> ExitCode {
    let get = |name: &str| std::env::var(name).ok();
    let env = Environment::new(&get);
    let mut stdin = Vec::new();
    let read = std::io::stdin().take(STDIN_MAX).read_to_end(&mut stdin);
    let run = if loopback::asked(&stdin) { loopback::run } else { command::run };
    let unread = |cause| Error::Io { operation: "read the network configuration from", object: "stdin".into(), cause };
    let (answer, code) = match read.map_err(unread).and_then(|_| run(&env, &stdin)) {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(error) => (Some(error_result(&Config::answer_version(&stdin), &error)), ExitCode::FAILURE),
    };
    if let Some(answer) = answer {
        let _ = writeln!(std::io::stdout(), "{answer}"); // nobody to tell if the runtime has gone
    }
    code
}
