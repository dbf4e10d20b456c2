//! What other parts of control add to the API: read-only documents by path, and metrics.

use serde_json::Value;
use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

/// Makes the document anew for each request.
pub type Document = Box<dyn Fn() -> Value + Send + Sync>;

/// Appends lines in Prometheus' text form.
pub type Counters = Box<dyn Fn(&mut String) + Send + Sync>;

/// Documents and metrics. Clones share them.
#[derive(Clone, Default)]
pub struct Extra {
    documents: Arc<RwLock<HashMap<String, Document>>>,
    counters: Arc<RwLock<Vec<Counters>>>,
}

impl Extra {
    /// Adds or replaces the document at a path.
    pub fn set(&self, path: &str, document: Document) {
        self.documents.write().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), document);
    }

    /// The document at a path.
    pub fn get(&self, path: &str) -> Option<Value> {
        self.documents.read().unwrap_or_else(PoisonError::into_inner).get(path).map(|document| document())
    }

    /// Adds metrics.
    pub fn add_metrics(&self, counters: Counters) {
        self.counters.write().unwrap_or_else(PoisonError::into_inner).push(counters);
    }

    /// The added metrics as text.
    pub fn metrics(&self) -> String {
        let mut out = String::new();
        for counters in self.counters.read().unwrap_or_else(PoisonError::into_inner).iter() {
            counters(&mut out);
        }
        out
    }
}
