// Command check reads Kubernetes objects (YAML) as strictly as kube-apiserver does: a field that the kind does not have,
// a field that stands twice or a value of another type is an error. It needs no cluster. Kinds that no Kubernetes has by
// itself are errors as well, unless they are named by -other.
//
// With -configs FOLDER it also writes the files of all ConfigMaps there, as CONFIGMAP-FILE. With -expressions it reads a
// Grafana dashboard instead, and prints its queries as rules, so that promtool can look at them.
package main

import (
	"bufio"
	encoding "encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/yaml"
	egress "k8s.io/apiserver/pkg/apis/apiserver/v1beta1"
	"k8s.io/client-go/kubernetes/scheme"
	aggregation "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	sigsyaml "sigs.k8s.io/yaml"
)

func main() {
	other := flag.String("other", "", "kinds that need not be known, separated by commas")
	configs := flag.String("configs", "", "a folder for the files of ConfigMaps")
	expressions := flag.Bool("expressions", false, "print the queries of dashboards")
	flag.Parse()
	do := func() error { return run(flag.Args(), strings.Split(*other, ","), *configs) }
	if *expressions {
		do = func() error { return printExpressions(flag.Args()) }
	}
	if err := do(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(paths, other []string, configs string) error {
	known := scheme.Scheme
	for _, add := range []func(*runtime.Scheme) error{aggregation.AddToScheme, egress.AddToScheme} {
		if err := add(known); err != nil {
			return err
		}
	}
	decoder := serializer.NewCodecFactory(known, serializer.EnableStrict).UniversalDeserializer()
	objects, wrong := 0, []error{}
	for _, path := range paths {
		documents, err := split(path)
		if err != nil {
			return err
		}
		for _, document := range documents {
			kind, err := json.DefaultMetaFactory.Interpret(jsonOf(document))
			switch {
			case err == nil && slices.Contains(other, kind.Kind):
			case err != nil:
				wrong = append(wrong, fmt.Errorf("%s: %w", path, err))
			default:
				object, _, err := decoder.Decode(document, nil, nil)
				if err == nil {
					err = keep(object, configs)
				}
				if err != nil {
					wrong = append(wrong, fmt.Errorf("%s: %w", path, err))
				}
			}
			objects++
		}
	}
	if objects == 0 {
		return errors.New("there is no object in what was given")
	}
	return errors.Join(wrong...)
}

// keep writes the files of a ConfigMap.
func keep(object runtime.Object, folder string) error {
	config, is := object.(*core.ConfigMap)
	if !is || folder == "" {
		return nil
	}
	for name, text := range config.Data {
		if err := os.WriteFile(filepath.Join(folder, config.Name+"-"+name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// printExpressions prints each query of each panel as a rule of Prometheus.
func printExpressions(paths []string) error {
	type panel struct {
		Title   string `json:"title"`
		Targets []struct {
			Expr string `json:"expr"`
		} `json:"targets"`
	}
	fmt.Println("groups:\n- name: dashboard\n  rules:")
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var dashboard struct {
			Panels []panel `json:"panels"`
		}
		if err := encoding.Unmarshal(text, &dashboard); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		number := 0
		for _, panel := range dashboard.Panels {
			for _, target := range panel.Targets {
				number++
				expr := strings.NewReplacer("$__rate_interval", "5m", "$__range", "1h").Replace(target.Expr)
				fmt.Printf("  - record: query_%d\n    expr: %q\n", number, expr)
			}
		}
		if number == 0 {
			return fmt.Errorf("%s has no query", path)
		}
	}
	return nil
}

// split returns the documents of a file that are not empty.
func split(path string) ([][]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var found [][]byte
	reader := yaml.NewYAMLReader(bufio.NewReader(file))
	for {
		document, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return found, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if text := string(jsonOf(document)); text != "null" && text != "" {
			found = append(found, document)
		}
	}
}

// jsonOf is nil for what is no YAML; whoever reads it then says so.
func jsonOf(document []byte) []byte {
	text, err := sigsyaml.YAMLToJSON(document)
	if err != nil {
		return nil
	}
	return text
}
