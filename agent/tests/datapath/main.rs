//! The data path end to end: a node with real pods, an agent that is killed and comes back, real connections.
//!
//! The test process makes itself a node (namespaces, cgroup root, BPF file system) before its first thread, so it has
//! a `main` of its own. Children of it play the other parts, chosen by an environment variable. Needs root.

mod around;
mod balance;
mod between;
mod capture;
mod ground;
mod nodes;
mod outside;
mod parts;
mod placement;
mod refusals;
mod storm;
mod told;

use ground::Ground;

fn main() {
    if let Ok(part) = std::env::var(parts::PART) {
        return parts::play(&part);
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let exact = std::env::args().any(|a| a == "--exact");
    if std::env::args().any(|a| a == "--list") {
        return;
    }
    type Story = fn(&Ground);
    let stories: [(&str, Story); 11] = [
        ("outside", outside::story),
        ("outside-clsact", outside::without_tcx),
        ("outside-xdp", outside::with_xdp),
        ("outside-dsr", outside::with_dsr),
        (nodes::STORY, nodes::story),
        ("balance", balance::story),
        ("refusals", refusals::story),
        ("capture", capture::story),
        ("between", between::story),
        ("told", told::story),
        ("storm", storm::story),
    ];
    let meant = |name: &str| {
        filters.is_empty() || filters.iter().any(|f| if exact { name == f } else { name.contains(f.as_str()) })
    };
    let plugin = ground::build_plugin();
    // From where it sees what this process sees now: it makes itself a node beside this one, not in it.
    let other = meant(nodes::STORY).then(|| nodes::Other::start(&plugin));
    let mut ground = Ground::new(plugin);
    ground.other = other;
    for (name, story) in stories {
        if meant(name) {
            let begun = std::time::Instant::now();
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| story(&ground)));
            if let Err(cause) = outcome {
                ground.explain();
                std::panic::resume_unwind(cause);
            }
            println!("test {name} ... ok ({:.1} s)", begun.elapsed().as_secs_f64());
        }
    }
}
