//! Drift: what others changed in the kernel is put back. Called every second.

use super::{Datapath, Error, namespaces, open_maps, pod_links, reset};
use sluice_cni::{
    Lease, command, packets,
    store::Lock,
    wiring::{self, Inside},
};
use sluice_ebpf::{
    common::Addr,
    loader,
    maps::{padded, pin_dir},
    sweep::Sweeper,
};
use sluice_netlink::link;
use std::{collections::BTreeSet, time::Duration};

/// An ADD takes milliseconds; what is missing of a pod after this is drift.
const SETTLED: Duration = Duration::from_secs(2);

/// How much is compared: the services are many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    Whole,
    /// Some of them, the next ones the next time.
    Some,
}

impl Datapath {
    /// Compares the kernel with what is wanted and restores; says what was wrong. Also ends leases whose links have
    /// gone. Goes on after a failure, and returns the first one.
    pub fn repair(&mut self, extent: Extent) -> Result<Vec<String>, Error> {
        let mut wrong = Vec::new();
        let outcomes = [
            self.repair_programs(&mut wrong),
            self.repair_services(extent, &mut wrong),
            self.repair_sockets(),
            self.repair_pods(&mut wrong),
            self.repair_node(&mut wrong),
            self.sweep(),
        ];
        outcomes.into_iter().collect::<Result<(), Error>>().map(|()| wrong)
    }

    fn repair_programs(&mut self, wrong: &mut Vec<String>) -> Result<(), Error> {
        let reload = |d: &mut Self, _: &Lock| {
            if !loader::damaged(&d.place).map_err(Error::Load)? {
                return Ok(false);
            }
            // In the way it was loaded before: a fallback stays forced.
            loader::load_with(&d.place, d.loaded.set_retval).map_err(Error::Load)?;
            // What is at pods' links went by the maps that were there before.
            let links = pod_links(d.wires.connection(), &d.store.held().map_err(Error::Leases)?)?;
            packets::renew_pods(&d.place.bpffs, d.wires.connection(), &links).map_err(Error::Packets)?;
            Ok(true)
        };
        if self.locked(reload)? {
            wrong.push("programs or maps were unpinned".into());
            (self.table, self.pod_table, self.counters) = open_maps(&self.place.bpffs).map_err(Error::Load)?;
            self.sweeper = Sweeper::open(&pin_dir(&self.place.bpffs)).map_err(Error::Load)?;
            self.ports.reopen().map_err(Error::Load)?;
            self.settings.reopen().map_err(Error::Settings)?;
            self.renewed.send_replace(());
        }
        Ok(())
    }

    fn repair_services(&mut self, extent: Extent, wrong: &mut Vec<String>) -> Result<(), Error> {
        let Some(compiled) = self.compiler.compiled() else { return Ok(()) };
        let looked = match extent {
            Extent::Whole => self.table.reread(),
            Extent::Some => self.table.look(),
        };
        looked.map_err(Error::Services)?;
        let changes = self.table.apply(&compiled.services).map_err(Error::Services)?;
        if changes.written + changes.removed > 0 {
            wrong.push(format!("{} service entries", changes.written + changes.removed));
        }
        Ok(())
    }

    /// Closes sockets that lead to nobody: of host ports, whose pods go without a word to us, and such as were connected in
    /// the moment that their service changed.
    fn repair_sockets(&mut self) -> Result<(), Error> {
        // Before the first view it is not known who leads where.
        if !self.reset {
            return Ok(());
        }
        let stranded = self.table.stranded_next().map_err(Error::Services)?;
        if stranded.is_empty() {
            return Ok(());
        }
        let leases = self.store.held().map_err(Error::Leases)?;
        let (closed, failed) = reset::reset(&self.table, Ok(stranded), namespaces(&leases));
        if closed > 0 {
            tracing::info!(sockets = closed, "closed connected UDP sockets whose backend has gone");
        }
        failed.into_iter().next().map_or(Ok(()), |e| Err(Error::Sockets(e)))
    }

    fn repair_pods(&mut self, wrong: &mut Vec<String>) -> Result<(), Error> {
        let outcome = self.locked(|d, lock| {
            command::free_released(&d.store, d.wires.connection(), lock, None).map_err(Error::Leases)?;
            let leases = d.store.held().map_err(Error::Leases)?;
            // A pod whose lease cannot be read runs all the same.
            let damaged = d.damaged(&leases)?;
            d.remove_strays(&leases.into_iter().chain(damaged).collect::<Vec<_>>(), wrong)?;
            for lease in &d.store.settled(SETTLED).map_err(Error::Leases)? {
                d.repair_pod(lease, lock, wrong)?;
            }
            Ok(())
        });
        let changed = self.locked(|d, _| d.apply_pods())?;
        if changed > 0 {
            wrong.push(format!("{changed} pod flags or ports"));
        }
        outcome
    }

    /// Entries of pods that have no lease: left by a plugin that was killed in the middle of DEL.
    fn remove_strays(&self, leases: &[Lease], wrong: &mut Vec<String>) -> Result<(), Error> {
        let maps = &self.pod_table.maps;
        let known = |cookie: u64| leases.iter().any(|l| l.netns_cookie == cookie);
        for (cookie, _) in maps.pods.entries().map_err(Error::Pods)?.into_iter().filter(|(c, _)| !known(*c)) {
            maps.pods.remove(&cookie).map_err(Error::Pods)?;
            wrong.push(format!("entry of namespace {cookie}, which no lease names"));
        }
        for (addr, _) in maps.addrs.entries().map_err(Error::Pods)?.into_iter().filter(|(_, a)| !known(a.netns)) {
            maps.addrs.remove(&addr).map_err(Error::Pods)?;
        }
        // A pod that is being made has its host ports before it is in the maps.
        let leased: BTreeSet<Addr> =
            leases.iter().flat_map(|l| &l.addresses).map(|ip| sluice_ebpf::addr(*ip)).collect();
        for (key, to) in maps.host_ports.entries().map_err(Error::Pods)? {
            if !leased.contains(&to.addr) {
                maps.host_ports.remove(&key).map_err(Error::Pods)?;
                wrong.push(format!("host port {} of no pod", u16::from_be(key.port_be)));
            }
        }
        let attached = loader::attached_pods(&self.place.bpffs).map_err(Error::Pods)?;
        let mut stray = attached.into_iter().filter(|c| !known(*c));
        stray.try_for_each(|c| loader::detach_pod(&self.place.bpffs, c).map_err(Error::Pods))
    }

    /// Puts a pod back into the maps. One whose link is not there yet is the plugin's to finish; one whose namespace
    /// has gone is the runtime's to remove.
    fn repair_pod(&mut self, lease: &Lease, _lock: &Lock, wrong: &mut Vec<String>) -> Result<(), Error> {
        let maps = &self.pod_table.maps;
        let host = self.wires.connection();
        let enlisted = wiring::enlisted(&self.place.bpffs, maps, host, lease).map_err(Error::Leases)?;
        let same = |p: sluice_ebpf::common::Pod| p.uid == padded(&lease.pod.uid);
        if enlisted && maps.pods.get(&lease.netns_cookie).map_err(Error::Pods)?.is_some_and(same) {
            return Ok(());
        }
        let found = link::find(host, &lease.link).map_err(Error::Node)?;
        let (Some(found), Ok(inside)) = (found, Inside::open(&lease.netns)) else { return Ok(()) };
        if inside.cookie != lease.netns_cookie {
            return Ok(());
        }
        wiring::enlist(&self.place.bpffs, maps, host, &inside, lease, found.index).map_err(Error::Leases)?;
        wrong.push(format!("pod {} was not in the maps", lease.pod));
        Ok(())
    }

    fn repair_node(&mut self, wrong: &mut Vec<String>) -> Result<(), Error> {
        if self.wires.ensure_settings().map_err(Error::Node)? {
            wrong.push("forwarding was off".into());
        }
        let leases = self.store.settled(SETTLED).map_err(Error::Leases)?;
        let operations = self.wires.reconcile(&leases).map_err(Error::Node)?;
        wrong.extend(operations.iter().map(|o| format!("needed: {o}")));
        // Links and addresses come and go: to follow them is no repair.
        self.follow()?;
        Ok(())
    }
}
