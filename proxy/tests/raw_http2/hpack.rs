//! RFC 7541: header blocks that cannot be decoded end the connection, since both ends' tables differ from then on.

use crate::{
    frames::*,
    ground::{Case, Want::*, case, play},
};

/// The library says PROTOCOL_ERROR where §4.3 of RFC 9113 has a code of its own; either ends the connection.
const LOST: crate::ground::Want = Connection(&[COMPRESSION_ERROR, PROTOCOL_ERROR]);

fn block_of(section: &'static str, name: &'static str, tail: &[u8]) -> Case {
    let block = [request("GET", &[]), tail.to_vec()].concat();
    case(section, name, frame(HEADERS, WHOLE, 1, block), LOST)
}

#[test]
fn blocks_that_cannot_be_decoded() {
    let served = |name, block: Vec<u8>| case("RFC 7541", name, frame(HEADERS, WHOLE, 1, block), Served(1));
    play(&[
        block_of("RFC 7541 2.3.3", "an index above the tables", &[0x80 | 70]),
        block_of("RFC 7541 2.3.3", "a name's index above the tables", &[0x40 | 63, 1, b'x']),
        block_of("RFC 7541 6.1", "index 0", &[0x80]),
        block_of("RFC 7541 5.1", "an integer without end", &[0xff; 12]),
        block_of("RFC 7541 5.1", "an integer cut short", &[0xff]),
        block_of("RFC 7541 5.2", "a string cut short", &[0, 5, b'x']),
        block_of("RFC 7541 5.2", "a padding longer than 7 bits", &[0, 1, b'x', 0x82, 0x1f, 0xff]),
        block_of("RFC 7541 5.2", "a padding of zeros", &[0, 1, b'x', 0x81, 0x18]),
        block_of("RFC 7541 5.2", "the end symbol", &[0, 1, b'x', 0x84, 0xff, 0xff, 0xff, 0xff]),
        block_of("RFC 7541 4.2", "a size update after a header", &[0x20]),
        case(
            "RFC 7541 6.3",
            "a size update above the limit",
            frame(HEADERS, WHOLE, 1, [&[0x3f, 0xe2, 0x1f][..], &request("GET", &[])].concat()),
            LOST,
        ),
        served("a size update to the limit", [&[0x3f, 0xe1, 0x1f][..], &request("GET", &[])].concat()),
        served("static entries", [&[0x82, 0x86, 0x84][..], &header(":authority", "web.shop")].concat()),
        served(
            "a header that enters the table and one from it",
            [&request("GET", &[])[..], &[0x40, 1, b'x', 1, b'y', 0xbe]].concat(),
        ),
        served(
            "a header larger than the table empties it",
            [&request("GET", &[])[..], &[0x40], &string(b"x"), &string(&[b'y'; 5000])].concat(),
        ),
    ]);
}
