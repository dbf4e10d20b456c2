//! The compiled table of routes against a reference that looks at every match of every rule, for any routes and requests.
#![no_main]

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use sluice_fuzz::{PORT, parent, reference, request, routes};
use sluice_traffic::route::{Decision, Request, Table};

fuzz_target!(|input: &[u8]| {
    let mut u = Unstructured::new(input);
    let Ok(routes) = routes(&mut u) else { return };
    let table = Table::compile(&routes, &parent(), PORT);
    assert_eq!(named(&table, table.find_tcp()), reference::find_tcp(&routes));
    while let Ok(asked) = request(&mut u) {
        let of_table = Request {
            host: &asked.host,
            path: &asked.path,
            query: &asked.query,
            method: &asked.method,
            headers: &asked,
        };
        assert_eq!(named(&table, table.find(&of_table)), reference::find(&routes, &asked), "{asked:?} {routes:?}");
    }
});

/// The rule by its route's name and its position there.
fn named(table: &Table, decision: Decision) -> reference::Found {
    match decision {
        Decision::Rule(at) => {
            let rule = &table.rules()[at];
            reference::Found::Rule(rule.route.name.clone(), rule.position)
        }
        Decision::Own => reference::Found::Own,
        Decision::NoMatch => reference::Found::NoMatch,
    }
}
