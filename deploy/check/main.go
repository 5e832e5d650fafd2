// Command check reads Kubernetes objects (YAML) as strictly as kube-apiserver does: a field that the kind does not have,
// a field that stands twice or a value of another type is an error. It needs no cluster. Kinds that no Kubernetes has by
// itself are errors as well, unless they are named by -other.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

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
	flag.Parse()
	if err := run(flag.Args(), strings.Split(*other, ",")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(paths, other []string) error {
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
				if _, _, err := decoder.Decode(document, nil, nil); err != nil {
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
