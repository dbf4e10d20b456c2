//! PURE. The archive that a kernel unpacks into its first file system (`Documentation/driver-api/early-userspace`, format
//! `newc`). Owned by root, without times: equal inputs give equal bytes.

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Folders come before what is in them.
    pub fn dir(&mut self, path: &str, mode: u32) {
        self.entry(path, DIRECTORY | mode, &[]);
    }

    pub fn file(&mut self, path: &str, bytes: &[u8], mode: u32) {
        self.entry(path, REGULAR | mode, bytes);
    }

    pub fn link(&mut self, path: &str, to: &str) {
        self.entry(path, LINK | 0o777, to.as_bytes());
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        // Inode, mode, owner, group, links, time, size, devices of the file and of what it stands for, name, checksum.
        let (size, name) = (data.len() as u32, path.len() as u32 + 1);
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend(b"070701");
        self.bytes.extend(fields.iter().flat_map(|f| format!("{f:08X}").into_bytes()));
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_archive_ends() {
        let mut archive = Archive::default();
        archive.dir("bin", 0o755);
        archive.file("bin/a", b"12345", 0o644);
        archive.link("init", "bin/a");
        let bytes = archive.finish();
        let mode = |at: usize| u32::from_str_radix(std::str::from_utf8(&bytes[at + 14..at + 22]).expect("hex"), 16);
        assert_eq!(&bytes[110..116], b"bin\0\0\0");
        // 110 bytes of header and a name, to a multiple of four each.
        assert_eq!((mode(0), mode(116)), (Ok(0o040_755), Ok(0o100_644)));
        assert_eq!(&bytes[116 + 110..116 + 116], b"bin/a\0");
        assert_eq!(&bytes[232..240], b"12345\0\0\0");
        assert_eq!(mode(240), Ok(0o120_777));
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }
}
