//! What the agent sends to a sidecar, as any bytes: it is refused whole or put in force whole, what was accepted goes
//! out as it came in, and the worker's tables can be made of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use sluice_model::{Name, Revision};
use sluice_proxy::{
    config,
    held::{Assembly, Held},
};
use sluice_wire::{
    convert::{resource_from_wire, resource_to_wire},
    v1,
};

fuzz_target!(|input: &[u8]| {
    // Several messages, each after its length, as on the stream.
    let (mut rest, mut assembly, mut held) = (input, Assembly::default(), Held::default());
    while let Ok(message) = v1::ServerMessage::decode_length_delimited(&mut rest) {
        let Some(v1::server_message::Kind::Update(update)) = message.kind else { continue };
        for resource in update.changed.iter().cloned() {
            round_trip(resource);
        }
        if let Some(Ok(complete)) = assembly.chunk(update) {
            held = held.apply(complete);
            config::compile(&held, &Name::new("shop", "web"), None, 1);
        }
    }
});

fn round_trip(resource: v1::Resource) {
    let Ok(accepted) = resource_from_wire(resource) else { return };
    let sent = resource_to_wire(&accepted, Revision(7));
    let again = resource_from_wire(sent).expect("what was accepted is sent so that others accept it");
    assert_eq!(again, accepted);
}
