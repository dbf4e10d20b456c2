//! A simulated cluster under the plans: ReplicaSets do what they are told at once, pods become available when the case
//! says so. Whole rollouts run in microseconds.

use super::*;

struct World {
    deployment: Deployment,
    sets: Vec<Arc<ReplicaSet>>,
    now: i64,
}

impl World {
    fn new(replicas: i32, strategy: Value) -> Self {
        let deployment = json!({"metadata": {"name": "d", "namespace": "n", "uid": "d", "generation": 1}, "spec": {
            "replicas": replicas, "selector": {"matchLabels": {"a": "b"}}, "strategy": strategy, "progressDeadlineSeconds": 60,
            "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "v1"}]}}}});
        World { deployment: serde_json::from_value(deployment).expect("a deployment"), sets: Vec::new(), now: 1_000 }
    }

    fn image(&mut self, image: &str) {
        let spec = self.deployment.spec.as_mut().expect("spec");
        spec.template.spec.as_mut().expect("pod spec").containers[0].image = Some(image.to_owned());
        *self.deployment.metadata.generation.get_or_insert_default() += 1;
    }

    fn scale(&mut self, replicas: i32) {
        self.deployment.spec.as_mut().expect("spec").replicas = Some(replicas);
    }

    /// One step; true if anything was done.
    fn step(&mut self) -> bool {
        let now = Timestamp::from_second(self.now).expect("a time");
        let running = |set: &ReplicaSet| usize::try_from(set.status.as_ref().map_or(0, |s| s.replicas)).unwrap_or(0);
        let plan = plan(&self.deployment, &self.sets, &running, now);
        let mut changed = self.deployment.status.as_ref() != Some(&plan.status);
        self.deployment.status = Some(plan.status);
        if let Some(revision) = plan.revision {
            self.deployment
                .metadata
                .annotations
                .get_or_insert_default()
                .insert(REVISION.to_owned(), revision.to_string());
            changed = true;
        }
        match plan.step {
            Step::Nothing => return changed,
            Step::Create(mut set) => {
                set.metadata.uid = set.metadata.name.clone();
                self.now += 1;
                let time = Timestamp::from_second(self.now).expect("a time");
                set.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(time));
                self.sets.push(Arc::from(set));
            }
            Step::Change(changes) => {
                for (set, change) in changes {
                    let mut object = json!(*set);
                    crate::api::patch::merge(&mut object, &change);
                    let changed = serde_json::from_value(object).expect("a set");
                    let slot = self.sets.iter_mut().find(|known| known.uid() == set.uid()).expect("known");
                    *slot = Arc::new(changed);
                }
            }
            Step::Delete(sets) => self.sets.retain(|set| sets.iter().all(|gone| gone.uid() != set.uid())),
        }
        true
    }

    /// ReplicaSets have their pods; those of images in `healthy` become available.
    fn settle(&mut self, healthy: &[&str]) {
        for set in &mut self.sets {
            let mut new = (**set).clone();
            let image = new.spec.as_ref().and_then(|s| s.template.as_ref()).and_then(|t| t.spec.as_ref());
            let good = image.and_then(|s| s.containers[0].image.clone()).is_some_and(|i| healthy.contains(&i.as_str()));
            let count = replicas(&new);
            new.status = Some(k8s_openapi::api::apps::v1::ReplicaSetStatus {
                replicas: count,
                ready_replicas: Some(if good { count } else { 0 }),
                available_replicas: Some(if good { count } else { 0 }),
                ..Default::default()
            });
            *set = Arc::new(new);
        }
    }

    fn counts(&self) -> (i32, i32) {
        (total(&self.sets), self.sets.iter().map(|set| available(set)).sum())
    }

    /// Runs until nothing changes, checking the limits at each step.
    fn run(&mut self, healthy: &[&str], most: i32, least: i32) {
        for _ in 0..200 {
            let acted = self.step();
            let (pods, _) = self.counts();
            assert!(pods <= most, "{pods} pods, at most {most}");
            let before = self.counts();
            self.settle(healthy);
            assert!(self.counts().1 >= least, "{} available, at least {least}", self.counts().1);
            if !acted && before == self.counts() {
                return;
            }
        }
        panic!("does not settle");
    }

    fn condition(&self, kind: &str) -> (String, String) {
        let status = self.deployment.status.clone().expect("a status");
        let found = status.conditions.into_iter().flatten().find(|c| c.type_ == kind).expect("a condition");
        (found.status, found.reason.unwrap_or_default())
    }

    fn of_image(&self, image: &str) -> i32 {
        let is = |set: &&Arc<ReplicaSet>| json!(***set)["spec"]["template"]["spec"]["containers"][0]["image"] == image;
        self.sets.iter().filter(is).map(|set| replicas(set)).sum()
    }
}

#[test]
fn rolls_within_its_limits_and_ends_complete() {
    let mut world = World::new(10, json!({"type": "RollingUpdate"}));
    world.run(&["v1"], 13, 0);
    assert_eq!(world.condition("Progressing"), ("True".to_owned(), "NewReplicaSetAvailable".to_owned()));
    world.image("v2");
    world.run(&["v1", "v2"], 13, 8);
    assert_eq!((world.of_image("v1"), world.of_image("v2")), (0, 10));
    assert_eq!(world.condition("Available").0, "True");
    assert_eq!(world.deployment.metadata.annotations.as_ref().expect("annotations")[REVISION], "2");
}

#[test]
fn a_bad_version_stops_and_exceeds_its_deadline_and_undo_returns() {
    let mut world = World::new(10, json!({"type": "RollingUpdate"}));
    world.run(&["v1"], 13, 0);
    world.image("bad");
    world.run(&["v1"], 13, 8);
    assert_eq!(world.counts(), (13, 8));
    assert_eq!(world.condition("Progressing").0, "True");
    world.now += 61;
    world.run(&["v1"], 13, 8);
    assert_eq!(world.condition("Progressing"), ("False".to_owned(), "ProgressDeadlineExceeded".to_owned()));
    world.image("v1");
    world.run(&["v1"], 13, 8);
    assert_eq!((world.of_image("v1"), world.of_image("bad")), (10, 0));
    assert_eq!(world.deployment.metadata.annotations.as_ref().expect("annotations")[REVISION], "3");
    assert_eq!(world.sets.len(), 2, "the old set is used again");
}

#[test]
fn recreate_has_no_two_versions_at_once() {
    let mut world = World::new(3, json!({"type": "Recreate"}));
    world.run(&["v1"], 3, 0);
    world.image("v2");
    world.run(&["v1", "v2"], 3, 0);
    assert_eq!((world.of_image("v1"), world.of_image("v2")), (0, 3));
}

#[test]
fn scaling_in_the_middle_keeps_proportions() {
    let mut world =
        World::new(10, json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 2, "maxUnavailable": 2}}));
    world.run(&["v1"], 12, 0);
    world.image("bad");
    world.run(&["v1"], 12, 8);
    assert_eq!((world.of_image("v1"), world.of_image("bad")), (8, 4));
    world.scale(20);
    world.run(&["v1"], 22, 8);
    assert_eq!(world.of_image("v1") + world.of_image("bad"), 22);
    assert!(world.of_image("v1") > world.of_image("bad"));
    world.scale(0);
    world.run(&["v1"], 22, 0);
    assert_eq!(world.counts().0, 0);
}

#[test]
fn history_is_limited() {
    let mut world = World::new(1, json!({"type": "RollingUpdate"}));
    world.deployment.spec.as_mut().expect("spec").revision_history_limit = Some(2);
    for version in ["v1", "v2", "v3", "v4", "v5"] {
        world.image(version);
        world.run(&["v1", "v2", "v3", "v4", "v5"], 2, 0);
    }
    assert_eq!(world.sets.len(), 3);
}

#[test]
fn pausing_only_scales() {
    let mut world = World::new(4, json!({"type": "RollingUpdate"}));
    world.run(&["v1"], 5, 0);
    world.deployment.spec.as_mut().expect("spec").paused = Some(true);
    world.image("v2");
    world.scale(6);
    world.run(&["v1", "v2"], 8, 4);
    assert_eq!((world.of_image("v1"), world.of_image("v2")), (6, 0));
}

#[test]
fn limits_round_as_kubernetes() {
    for (wanted, surge, unavailable) in [(10, 3, 2), (3, 1, 0), (1, 1, 0), (4, 1, 1)] {
        let spec = DeploymentSpec { replicas: Some(wanted), ..DeploymentSpec::default() };
        let limits = limits(&spec);
        assert_eq!((limits.surge, limits.unavailable), (surge, unavailable), "{wanted}");
    }
}
